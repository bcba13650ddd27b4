"""Puts off the clipped sum of a large layer to where its stored products fit.

The head of a language model comes first in the backward, while all activations are still held, and its products for
all samples may be as large as the gradient of the logits: together they set the peak of the step. Nothing else waits
for them where a layer is clipped by itself. So norm, weights and sum move behind layers whose activations are freed in
the meantime, although the layer's own operands are then held longer, if the peak is lower for it.

Inductor keeps the order of a graph unless one of its own has a lower peak.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from itertools import accumulate

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, returns_views

STORES = (torch.ops.flashdp.outer_store.default,)
LARGE = 0.03  # of the peak: what is smaller stays where its operands are in the cache
CANDIDATES = 64  # places that are tried for each layer
PATIENCE = 4  # layers in a row for which no later place is better: under one group for all, none is
GAIN = 0.01  # of the peak, at least, for a later place
_CALLS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
)


def release_late(graph: fx.Graph) -> int:
    """Moves the releases of large layers, in place; returns how many."""
    stores = [n for op in STORES for n in graph.find_nodes(op="call_function", target=op)]
    if not stores or not all(_is_static(n) for n in stores):
        return 0
    memory = _Memory(graph)
    least, moved, stayed = LARGE * memory.peak(list(graph.nodes)), 0, 0
    for store in stores:
        if memory.bytes[store] > least and stayed < PATIENCE:
            gains = _put_off(graph, memory, store)
            moved, stayed = (moved + 1, 0) if gains else (moved, stayed + 1)
    return moved


def _put_off(graph: fx.Graph, memory: _Memory, store: fx.Node) -> bool:
    nodes = list(graph.nodes)
    chain = _dependents(store)
    first = nodes.index(store)
    places = range(first, len(nodes) - 1)
    order, lowest = nodes, memory.peak(nodes) * (1 - GAIN)
    if memory.peak(nodes, without=chain) >= lowest:  # the peak is elsewhere
        return False
    for last in places[:: max(1, len(places) // CANDIDATES)]:
        moved = [n for n in nodes[first : last + 1] if n in chain]
        tried = [*nodes[:first], *(n for n in nodes[first : last + 1] if n not in chain), *moved, *nodes[last + 1 :]]
        if (peak := memory.peak(tried)) < lowest:
            order, lowest = tried, peak * (1 - GAIN)
    if order is nodes:
        return False
    for before, node in zip(order, order[1:], strict=False):
        before.append(node)
    return True


def _dependents(node: fx.Node) -> set[fx.Node]:
    """A node and all that read it, directly or not; the output is in its place anyway."""
    found, front = {node}, [node]
    while front:
        for user in front.pop().users:
            if user not in found and user.op != "output":
                found.add(user)
                front.append(user)
    return found


def _is_static(node: fx.Node) -> bool:
    return all(isinstance(n, int) for v in node.meta["val"] for n in v.shape)


class _Memory:
    """The memory of a graph's values in any order of its nodes: each is held from its maker to its last reader.

    A view is held as what it views. What neither a library nor one of our kernels makes or reads is left out: Inductor
    fuses most of it away, and a softmax over a vocabulary in float32 would hide everything else.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.bytes: dict[fx.Node, int] = {}
        self._owner: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            viewed = node.args[0] if _is_view(node) else None
            self._owner[node] = self._owner[viewed] if isinstance(viewed, fx.Node) else node
            self.bytes[node] = 0
        for node in graph.nodes:
            kept = node.op in ("placeholder", "output") or _is_opaque(node.target)
            for value in (node, *node.all_input_nodes) if kept else ():
                owner = self._owner[value]
                self.bytes[owner] = _size(owner.meta.get("val"))

    def peak(self, order: list[fx.Node], without: Set[fx.Node] = frozenset()) -> int:
        """The most bytes held at a time when nodes run in this order; `without` are not run and make nothing."""
        made: dict[fx.Node, int] = {}
        read: dict[fx.Node, int] = {}
        for at, node in enumerate(order):
            if node in without:
                continue
            made.setdefault(self._owner[node], at)
            for used in (node, *node.all_input_nodes):
                read[self._owner[used]] = at
        change = [0] * (len(order) + 1)
        for node, at in made.items():
            change[0 if node.op == "placeholder" else at] += self.bytes[node]
            change[read[node] + 1] -= self.bytes[node]
        return max(accumulate(change))


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args:
        return False
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and returns_views(node.target))


def _is_opaque(target: object) -> bool:
    """Whether an op is a call of its own, whose operands and results are all in memory."""
    if not isinstance(target, OpOverload):
        return False
    return target.namespace not in ("aten", "prims") or target._opname.startswith(_CALLS)


def _size(value: object) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_size, value))
    if not isinstance(value, torch.Tensor) or not all(isinstance(n, int) for n in value.shape):
        return 0
    return value.numel() * value.element_size()
