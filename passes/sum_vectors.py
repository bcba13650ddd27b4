"""The clipped sums of small gradients, of all layers, in a few launches.

A model has hundreds of biases and scales of norms, each of which would be summed over the samples by a launch of its
own. Their per-sample gradients [B, n] are small, so they can wait for each other:

    add_noise(sum(where(w != 0, v * w, 0), [0]), key, stream, std)      one of the results of vector_sums

Runs behind the proof. The noise is exactly what add_noise would draw, that of (key, stream), so streams stay apart as
proved; the sums differ by rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from flashdp_compile.compat import sort_topologically
from flashdp_compile.passes.clipped import is_zero
from flashdp_compile.passes.points import RESHAPES

aten, flashdp = torch.ops.aten, torch.ops.flashdp

SMALL = 1 << 20  # elements of all samples: a larger gradient is worth a launch of its own
AT_ONCE = 64  # vectors that one launch sums: a kernel for hundreds takes long to compile


class Vector(NamedTuple):
    """sum_b w_b v_b, reshaped, with noise: what `noise` gives. v is [B, *shape], w is [B]."""

    noise: fx.Node
    values: fx.Node
    weights: fx.Node


def sum_vectors(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the sums on devices of this type, in place; returns how many."""
    vectors = [v for n in graph.find_nodes(op="call_function", target=flashdp.add_noise.default) if (v := _read(n))]
    vectors = [v for v in vectors if v.values.meta["val"].device.type == device]
    groups: dict[Any, list[Vector]] = {}
    for vector in vectors:
        _, key, _, std = vector.noise.args
        groups.setdefault((key, std), []).append(vector)
    for (key, std), group in groups.items():
        for first in range(0, len(group), AT_ONCE):
            _together(graph, key, std, group[first : first + AT_ONCE])
    sort_topologically(graph)  # a sum may now come behind what reads it
    return len(vectors)


def _read(noise: fx.Node) -> Vector | None:
    total = _viewed(noise.args[0])
    if total.target is not aten.sum.dim_IntList or len(total.args) != 2 or total.kwargs or list(total.args[1]) != [0]:
        return None
    kept = total.args[0]
    if kept.target is not aten.where.self:
        return None
    nonzero, weighted, otherwise = kept.args
    if nonzero.target is not aten.ne.Scalar or nonzero.args[1] != 0 or not is_zero(otherwise):
        return None
    weights = _viewed(nonzero.args[0])
    factors = weighted.args if weighted.target is aten.mul.Tensor else ()
    values = [n for n in factors if isinstance(n, fx.Node) and _viewed(n) is not weights]
    if len(factors) != 2 or len(values) != 1 or not _fits(values[0].meta["val"], weights.meta["val"]):
        return None
    by = next(n for n in factors if n is not values[0])
    along_samples = (*values[0].meta["val"].shape[:1], *[1] * (values[0].meta["val"].dim() - 1))
    if not all(tuple(n.meta["val"].shape) == along_samples for n in (by, nonzero)):
        return None
    return Vector(noise, values[0], weights)


def _viewed(node: fx.Node) -> fx.Node:
    while node.target in RESHAPES:
        node = node.args[0]
    return node


def _fits(values: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether values are those of a small vector, one for each weight."""
    static = all(isinstance(n, int) for n in (*values.shape, *values.stride(), *weights.shape))
    if not static or values.dtype != torch.float32 or weights.dtype != torch.float32:
        return False
    return (
        weights.dim() == 1
        and values.shape[:1] == weights.shape
        and values.is_contiguous()
        and 0 < values.numel() <= SMALL
    )


def _together(graph: fx.Graph, key: fx.Node, std: float, vectors: list[Vector]) -> None:
    with graph.inserting_before(vectors[-1].noise):
        values = [_call(graph, aten.reshape.default, v.values, _rows(v.values)) for v in vectors]
        weights, streams = [v.weights for v in vectors], [v.noise.args[2] for v in vectors]
        sums = _call(graph, flashdp.vector_sums.default, values, weights, key, streams, std)
        for number, vector in enumerate(vectors):
            one = _call(graph, operator.getitem, sums, number)
            shaped = _call(graph, aten.reshape.default, one, list(vector.noise.meta["val"].shape))
            vector.noise.replace_all_uses_with(shaped)
    for vector in vectors:
        _erase(vector.noise)


def _erase(node: fx.Node) -> None:
    """A node that nobody reads, and what it alone has read."""
    unread = dict.fromkeys([node])
    while unread:
        node, _ = unread.popitem()
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        unread |= dict.fromkeys(n for n in operands if not n.users and n.op == "call_function")


def _rows(node: fx.Node) -> list[int]:
    value = node.meta["val"]
    return [value.shape[0], value.numel() // value.shape[0]]


def _call(graph: fx.Graph, op: Callable[..., Any], *args: Any) -> fx.Node:
    node = graph.call_function(op, args)
    node.meta["val"] = op(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node
