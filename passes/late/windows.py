"""Which launches become one: runs of them, as long as they fill a device and as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from torch import fx

from flashdp_compile.kernels.common import cdiv
from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.order import Step, behind, dependents

ROUNDS = ((3, 8), (1, 3))  # windows of so many rounds of programs, at least and at most: tried in this order
LAYERS = 64  # of a window, at most: a kernel has several arguments for each


class Fitting:
    """Windows of a graph's nodes that one launch can replace, each at the place of its last node, within a limit of
    memory: a node waits for the others of its window, and its operands are held meanwhile. Where a graph is above the
    limit without windows, none may add to it. Calls of `then` that read what a window makes are expected to become one
    launch as well."""

    def __init__(self, graph: fx.Graph, limit: float, then: object = None) -> None:
        self._memory, self._order, self._limit, self._then = Memory(graph), list[Step](graph.nodes), limit, then
        self._above = self._beyond(self._order)

    def windows(
        self, nodes: list[fx.Node], tiles: Callable[[fx.Node], int], rounds: int, room: int
    ) -> list[list[fx.Node]]:
        """Those of nodes which may share launches. `tiles`: how many programs each has, on a device with room for so
        many; `rounds`: how many times as many rounds as ROUNDS says a window has."""
        found: list[list[fx.Node]] = []
        for least, most in ROUNDS:
            waiting = [n for n in nodes if not any(n in window for window in found)]
            counts = [tiles(n) for n in waiting]
            proposed = fullest(waiting, counts, least * rounds * room, most * rounds * room, room)
            found += [window for window in proposed if self._accepts(window)]
        return found

    def _accepts(self, window: list[fx.Node]) -> bool:
        """Whether memory suffices, besides the windows that were accepted before; it then is one of them."""
        readers = dependents(window)
        if not readers.isdisjoint(window):
            return False
        order = self._with(window, readers)
        above = self._beyond(order)
        fits = all(new <= old for new, old in zip(above, self._above, strict=True))
        if fits:
            self._order, self._above = order, above
        return fits

    def _beyond(self, order: list[Step]) -> tuple[float, float]:
        """By how much memory is above the limit at its peak, and summed over all nodes."""
        above = [max(0.0, held - self._limit) for held in self._memory.held(order)]
        counts = (len(step) if isinstance(step, tuple) else 1 for step in order)
        return max(above), sum(a * n for a, n in zip(above, counts, strict=True))

    def _with(self, window: list[fx.Node], readers: Set[fx.Node]) -> list[Step]:
        """The order in which a window is one launch, and what reads it runs behind it."""
        order = _at_once(self._order, window, readers)
        # read from one of several results, each of which is a node
        read = dict.fromkeys(u for n in window for value in (n, *n.users) for u in value.users)
        calls = [u for u in read if u.target is self._then and u in order]
        return _at_once(order, calls, dependents(calls)) if calls else order


def _at_once(order: list[Step], nodes: list[fx.Node], readers: Set[fx.Node]) -> list[Step]:
    """The order in which nodes run together where the last of them ran, and what reads them behind them."""
    order = behind(order, max(map(order.index, nodes)), nodes, readers)
    first = min(map(order.index, nodes))
    order[first : first + len(nodes)] = [tuple(nodes)]
    return order


def fullest(nodes: Sequence[fx.Node], tiles: list[int], least: int, most: int, room: int) -> list[list[fx.Node]]:
    """Runs of nodes with `most` programs or fewer, that take the fewest rounds on a device with room for so many.

    A node with `least` programs or more is in none: it fills the device alone.
    """
    waiting = [at for at, count in enumerate(tiles) if count < least]
    best = [(0, 0, 0)]  # for the first so many: rounds, windows, and where the last of these starts
    for end in range(1, len(waiting) + 1):
        options, total = list[tuple[int, int, int]](), 0
        for start in reversed(range(end)):
            total += tiles[waiting[start]]
            if (total > most or end - start > LAYERS) and options:
                break
            rounds, windows, _ = best[start]
            options.append((rounds + cdiv(total, room), windows + 1, start))
        best.append(min(options))
    found, end = list[list[fx.Node]](), len(waiting)
    while end:
        start = best[end][2]
        if end - start > 1:
            found.insert(0, [nodes[at] for at in waiting[start:end]])
        end = start
    return found
