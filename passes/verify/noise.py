"""Every release is a clipped sum with the stated noise, scaled as its loss was, and nothing in between."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import size_expression
from flashdp_compile.passes.axes.domain import same
from flashdp_compile.passes.verify.clipped import WIDE, NotProved
from flashdp_compile.passes.verify.graph import Graph

aten, prims, flashdp = torch.ops.aten, torch.ops.prims, torch.ops.flashdp


def sums_behind_noise(graph: Graph) -> dict[int, fx.Node]:
    """The clipped sum of every release, by its position; each has noise of a stream of its own."""
    scaled = graph.guarantee.mechanism.grad_scaler is not None and bool(graph.before.released)
    if len(scales := graph.added("grad_scale")) != scaled:
        raise NotProved(f"the loss is scaled by {scales}, which is not what the options say")
    streams: dict[int, int] = {}
    sums = {position: _unnoised(graph, position, streams) for position in graph.before.released}
    if len(graph.added("add_noise")) != len(streams):
        raise NotProved("there is noise that belongs to no gradient")
    return sums


def _unnoised(graph: Graph, position: int, streams: dict[int, int]) -> fx.Node:
    """The clipped sum behind a release; `streams` holds whose noise each stream is."""
    guarantee, mechanism = graph.guarantee, graph.guarantee.mechanism
    node, gradient = graph.results[position], graph.before.released[position]
    name, dtype = gradient.name, gradient.node.meta["val"].dtype
    if node.target is prims.convert_element_type.default and node.args[1] == dtype and not mechanism.owed:
        node = node.args[0]
    if node.meta["val"].dtype not in WIDE:
        raise NotProved(f"the gradient of {name} was rounded to {node.meta['val'].dtype} before its noise")
    if mechanism.grad_scaler is not None:
        node = _unscaled(graph, node, name)
    if mechanism.noise_multiplier == 0:
        return node
    divisor = guarantee.divisor(graph.joint.batch)
    if divisor is None:
        node = _without_size(graph, node, aten.div.Tensor, name)
    if node.target is not flashdp.add_noise.default:
        raise NotProved(f"the gradient of {name} leaves the graph without noise (it ends in {node.target})")
    summed, key, stream, deviation = node.args
    if [key] != graph.added("draw_key") or key.args[1] != mechanism.seed or key.args[0] not in graph.backward:
        raise NotProved(f"the noise of {name} is not drawn from the one key of this release")
    if key.meta["val"].device != summed.meta["val"].device:
        raise NotProved(f"the noise of {name} is drawn on another device than its gradient's")
    # Philox would take it modulo 2^32. Not `in range`, which counts up to 2^32 for anything but an int.
    if not isinstance(stream, int) or not 0 <= stream < 2**32:
        raise NotProved(f"the noise of {name} has the stream {stream}")
    if streams.setdefault(stream, position) != position:
        raise NotProved(f"the gradient of {name} would get the noise of another parameter")
    stated = guarantee.deviation / (divisor or 1)
    if not math.isclose(deviation, stated, rel_tol=1e-12):
        raise NotProved(f"the noise of {name} has the deviation {deviation}, not {stated}")
    if divisor is None:
        summed = _without_size(graph, summed, aten.mul.Tensor, name)
    return summed


def _unscaled(graph: Graph, node: fx.Node, name: str) -> fx.Node:
    """The release in release * s, for the scale s of the loss, looked up in this very backward."""
    (scale,) = graph.added("grad_scale")
    if node.target is not aten.mul.Tensor or node.kwargs or node.args[1] is not scale:
        raise NotProved(f"the gradient of {name} is not scaled as its loss was")
    if scale.args[1] != graph.guarantee.mechanism.grad_scaler or scale.args[0] not in graph.backward:
        raise NotProved(f"the gradient of {name} is scaled by another scaler, or by an old scale")
    return node.args[0]


def _without_size(graph: Graph, node: fx.Node, target: Any, name: str) -> fx.Node:
    """The value in value / B or value * B, for a B that is max(size of the batch, 1)."""
    if node.target is target and not node.kwargs and len(node.args) == 2:
        value, by = node.args
        size = by.args[0] if isinstance(by, fx.Node) and by.target is torch.sym_max and by.args[1] == 1 else None
        if size is not None and same(size_expression(size.meta["val"]), graph.joint.batch):
            return value
    raise NotProved(f"the gradient of {name} is not divided by the size of the batch behind its noise")
