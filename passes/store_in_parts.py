"""Makes the products of a large layer for a few samples at a time, where those of all of them set the peak of memory.

    product, norms = outer_store(x, g)
    product_sum(product, clip_factors(norms, ...), ...)        clipped_product(x, g, samples, ...)

The head of a language model has B x vocabulary x width products. `release_late` finds them a place where activations
have been freed; under activation checkpointing there is none. A layer that is clipped by itself need not have them all
at once. The sum is read and written once more for each part, so parts are as large as the peak allows.

What is made in parts may also run as soon as its operands are there, and these, such as the gradient of the logits, are
then no longer held for it.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from flashdp_compile.compat import argument, sort_topologically
from flashdp_compile.passes.memory import Memory
from flashdp_compile.passes.nodes import call, is_static
from flashdp_compile.passes.order import Step

flashdp = torch.ops.flashdp

LARGE = 0.02  # of the peak: smaller products stay together
GAIN = 0.01  # of the peak, at least


class Layer(NamedTuple):
    """One that is clipped by itself, from the products of all samples to their sum."""

    store: fx.Node
    product: fx.Node
    norms: fx.Node
    clip: fx.Node
    total: fx.Node


class Parts(NamedTuple):
    """A layer made behind `place`, so many samples at a time: the order of all nodes then, and its peak."""

    place: fx.Node
    samples: int
    order: list[Step]
    peak: int


def store_in_parts(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites layers on devices of this type, in place; returns how many."""
    stores = graph.find_nodes(op="call_function", target=flashdp.outer_store.default)
    layers = [found for store in stores if (found := _read(store, device)) is not None]
    if not layers:
        return 0
    memory, order, parted = Memory(graph), list[Step](graph.nodes), list[tuple[Layer, fx.Node, int]]()
    peak = memory.peak(order)
    for layer in sorted(layers, key=lambda layer: -memory.bytes[layer.product]):
        if memory.bytes[layer.product] < LARGE * peak:
            break
        whole = memory.bytes[layer.product]
        tried = [_tried(memory, order, layer, place) for place in (_earliest(order, layer), layer.total)]
        best = min(tried, key=lambda parts: parts.peak)
        if best.peak <= (1 - GAIN) * peak:
            parted.append((layer, best.place, best.samples))
            order, peak = best.order, best.peak
            memory.bytes[layer.product] = whole // _batch(layer) * best.samples
        else:
            memory.bytes[layer.product] = whole
    for layer, place, samples in parted:  # behind the loop: the memory knows the nodes that were there before
        _replace(graph, layer, place, samples)
    sort_topologically(graph)
    return len(parted)


def _read(store: fx.Node, device: str) -> Layer | None:
    """The layer of these products, unless others wait for its weights or it waits for others."""
    x = store.args[0].meta["val"]
    if x.device.type != device or not all(map(is_static, store.meta["val"])) or x.shape[0] < 2:
        return None
    parts = {n.args[1]: n for n in store.users if n.target is operator.getitem}
    if len(parts) != 2 or len(store.users) != 2 or len(parts[0].users) != 1:
        return None
    product, norms = parts[0], parts[1]
    (total,) = product.users
    if total.target is not flashdp.product_sum.default or total.args[0] is not product:
        return None
    clip = argument(total, "weights")
    if clip.target is not flashdp.clip_factors.default or clip.args[0] is not norms or len(clip.users) != 1:
        return None
    if argument(clip, "counts") or argument(clip, "others") is not None:
        return None
    return Layer(store, product, norms, clip, total)


def _earliest(order: list[Step], layer: Layer) -> fx.Node:
    """The node behind which all operands of a layer are there."""
    needed = {operand for node in layer for operand in node.all_input_nodes}.difference(layer)
    return next(n for n in reversed(_nodes(order)) if n in needed or n.op == "placeholder")


def _nodes(order: list[Step]) -> list[fx.Node]:
    return [node for step in order for node in (step if isinstance(step, tuple) else (step,))]


def _as_one(order: list[Step], layer: Layer, place: fx.Node) -> list[Step]:
    """The order in which the layer's nodes run at once, behind a node or in the place of its sum."""
    moved = list[Step]()
    for step in order:
        if step not in layer:
            moved.append(step)
        if step is place or (isinstance(step, tuple) and place in step):
            moved.append(tuple(layer))
    return moved


def _tried(memory: Memory, order: list[Step], layer: Layer, place: fx.Node) -> Parts:
    """With how many samples at a time the peak is the lowest or almost that. Their products alone are counted."""
    as_one, peaks = _as_one(order, layer, place), dict[int, int]()
    each = layer.product.meta["val"].nbytes // _batch(layer)
    for samples in sorted({max(1, _batch(layer) // 2**n) for n in range(1, _batch(layer).bit_length())}):
        memory.bytes[layer.product] = samples * each
        peaks[samples] = memory.peak(as_one)
    enough = max(n for n, p in peaks.items() if p <= (1 + GAIN) * min(peaks.values()))
    return Parts(place, enough, as_one, peaks[enough])


def _batch(layer: Layer) -> int:
    return int(layer.product.meta["val"].shape[0])


def _replace(graph: fx.Graph, layer: Layer, place: fx.Node, samples: int) -> None:
    policy = [argument(layer.clip, n) for n in ("bound", "fn", "mean", "expected_batch_size", "grad_scale")]
    noise = [argument(layer.total, n) for n in ("key", "stream", "std")]
    with graph.inserting_after(place):
        made = call(graph, flashdp.clipped_product.default, *layer.store.args, samples, *policy, *noise)
        total, norms = (call(graph, operator.getitem, made, at) for at in (0, 1))
    layer.total.replace_all_uses_with(total)
    for old in (layer.total, layer.clip):
        graph.erase_node(old)
    layer.norms.replace_all_uses_with(norms)
    for old in (layer.product, layer.norms, layer.store):
        graph.erase_node(old)
