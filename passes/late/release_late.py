"""Puts off the clipped sum of a large layer to where its stored products fit.

The head of a language model comes first in the backward, while all activations are still held, and its products for
all samples may be as large as the gradient of the logits: together they set the peak of the step. Nothing else waits
for them where a layer is clipped by itself. So norm, weights and sum move behind layers whose activations are freed in
the meantime, although the layer's own operands are then held longer, if the peak is lower for it.

Inductor keeps the order of a graph unless one of its own has a lower peak.
"""

from __future__ import annotations

import torch
from torch import fx

from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.nodes import is_static
from flashdp_compile.passes.order import behind, dependents

STORE = torch.ops.flashdp.outer_store.default
LARGE = 0.03  # of the peak: what is smaller stays where its operands are in the cache
CANDIDATES = 64  # places that are tried for each layer
PATIENCE = 4  # layers in a row for which no later place is better: under one group for all, none is
GAIN = 0.01  # of the peak, at least, for a later place


def release_late(graph: fx.Graph) -> int:
    """Moves the releases of large layers, in place; returns how many."""
    stores = graph.find_nodes(op="call_function", target=STORE)
    if not stores or not all(is_static(v) for n in stores for v in n.meta["val"]):
        return 0
    memory = Memory(graph)
    least, moved, stayed = LARGE * memory.peak(list(graph.nodes)), 0, 0
    for store in stores:
        if memory.made(store) > least and stayed < PATIENCE:
            gains = _put_off(graph, memory, store)
            moved, stayed = (moved + 1, 0) if gains else (moved, stayed + 1)
    return moved


def _put_off(graph: fx.Graph, memory: Memory, store: fx.Node) -> bool:
    nodes = list(graph.nodes)
    readers = dependents([store])
    first = nodes.index(store)
    places = range(first, len(nodes) - 1)
    order, lowest = nodes, memory.peak(nodes) * (1 - GAIN)
    if memory.peak(nodes, without={store, *readers}) >= lowest:  # the peak is elsewhere
        return False
    for last in places[:: max(1, len(places) // CANDIDATES)]:
        tried = behind(nodes, last, {store}, readers)
        if (peak := memory.peak(tried)) < lowest:
            order, lowest = tried, peak * (1 - GAIN)
    if order is nodes:
        return False
    for before, node in zip(order, order[1:], strict=False):
        before.append(node)
    return True
