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
    memory, nodes, done = Memory(graph), list(graph.nodes), 0
    peak = memory.peak(nodes)
    for layer in sorted(layers, key=lambda layer: -memory.bytes[layer.product]):
        if memory.bytes[layer.product] < LARGE * peak:
            break
        samples, peak = _samples(memory, nodes, layer, peak)
        if samples is not None:
            _replace(graph, layer, samples)
            done += 1
    sort_topologically(graph)
    return done


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


def _samples(memory: Memory, nodes: list[fx.Node], layer: Layer, peak: int) -> tuple[int | None, int]:
    """How many samples at a time, None for all; and the peak. The products stay counted as that many."""
    whole, batch = memory.bytes[layer.product], layer.product.meta["val"].shape[0]
    peaks = {}
    for samples in sorted({max(1, batch // 2**n) for n in range(1, batch.bit_length())}):
        memory.bytes[layer.product] = whole // batch * samples
        peaks[samples] = memory.peak(nodes)
    lowest = min(peaks.values())
    if lowest > (1 - GAIN) * peak:
        memory.bytes[layer.product] = whole
        return None, peak
    samples = max(n for n, p in peaks.items() if p <= (1 + GAIN) * lowest)
    memory.bytes[layer.product] = whole // batch * samples
    return samples, peaks[samples]


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
