"""Other orders of a graph's nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import fx

Step = fx.Node | tuple[fx.Node, ...]  # or several that run at once


def dependents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All that read these nodes, directly or not; not the output, which is in its place anyway."""
    found, front = set[fx.Node](), list(nodes)
    while front:
        for user in front.pop().users:
            if user not in found and user.op != "output":
                found.add(user)
                front.append(user)
    return found


def behind(order: Sequence[Step], at: int, nodes: Collection[fx.Node], readers: Collection[fx.Node]) -> list[Step]:
    """The order in which `nodes`, and behind them `readers`, run behind place `at`, as far as they ran before."""
    start = order[: at + 1]
    first = [step for step in start if _among(step, nodes)]
    then = [step for step in start if _among(step, readers) and not _among(step, nodes)]
    rest = [step for step in start if not _among(step, nodes) and not _among(step, readers)]
    return [*rest, *first, *then, *order[at + 1 :]]


def _among(step: Step, nodes: Collection[fx.Node]) -> bool:
    return any(n in nodes for n in step) if isinstance(step, tuple) else step in nodes
