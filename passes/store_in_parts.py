"""Makes the products of a large layer for a few samples at a time, where those of all of them set the peak of memory.

    product, norms = outer_store(x, g)
    product_sum(product, clip_factors(norms, ...), ...)        clipped_product(x, g, samples, ...)

The head of a language model has B x vocabulary x width products. `release_late` finds them a place where activations
have been freed; under activation checkpointing there is none. A layer that is clipped by itself need not have them all
at once. The sum is read and written once more for each part, so parts are as large as the peak allows.
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


def store_in_parts(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites layers on devices of this type, in place; returns how many."""
    stores = graph.find_nodes(op="call_function", target=flashdp.outer_store.default)
    layers = [found for store in stores if (found := _read(store, device)) is not None]
    if not layers:
        return 0
    memory, order, parted = Memory(graph), list[Step](graph.nodes), list[tuple[Layer, int]]()
    peak = memory.peak(order)
    for layer in sorted(layers, key=lambda layer: -memory.bytes[layer.product]):
        if memory.bytes[layer.product] < LARGE * peak:
            break
        whole, as_one = memory.bytes[layer.product], _as_one(order, layer)
        samples, lower = _samples(memory, as_one, layer)
        if lower <= (1 - GAIN) * peak:
            parted.append((layer, samples))
            order, peak = as_one, lower
        else:
            memory.bytes[layer.product] = whole
    for layer, samples in parted:  # behind the loop: the memory knows the nodes that were there before
        _replace(graph, layer, samples)
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


def _as_one(order: list[Step], layer: Layer) -> list[Step]:
    """The order in which the layer's nodes run at once, where its sum was made."""
    return [tuple(layer) if step is layer.total else step for step in order if step is layer.total or step not in layer]


def _samples(memory: Memory, order: list[Step], layer: Layer) -> tuple[int, int]:
    """How many samples at a time, for the lowest peak or almost that; and the peak. Their products alone are counted
    from here on."""
    batch = layer.product.meta["val"].shape[0]
    each, peaks = memory.bytes[layer.product] // batch, dict[int, int]()
    for samples in sorted({max(1, batch // 2**n) for n in range(1, batch.bit_length())}):
        memory.bytes[layer.product] = samples * each
        peaks[samples] = memory.peak(order)
    enough = max(n for n, p in peaks.items() if p <= (1 + GAIN) * min(peaks.values()))
    memory.bytes[layer.product] = enough * each
    return enough, peaks[enough]


def _replace(graph: fx.Graph, layer: Layer, samples: int) -> None:
    policy = [argument(layer.clip, n) for n in ("bound", "fn", "mean", "expected_batch_size", "grad_scale")]
    noise = [argument(layer.total, n) for n in ("key", "stream", "std")]
    with graph.inserting_before(layer.total):
        made = call(graph, flashdp.clipped_product.default, *layer.store.args, samples, *policy, *noise)
        total, norms = (call(graph, operator.getitem, made, at) for at in (0, 1))
    layer.total.replace_all_uses_with(total)
    for old in (layer.total, layer.clip):
        graph.erase_node(old)
    layer.norms.replace_all_uses_with(norms)
    for old in (layer.product, layer.norms, layer.store):
        graph.erase_node(old)
