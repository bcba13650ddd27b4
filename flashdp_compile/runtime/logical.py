"""Logical batches: clipped sums of micro-batches that are added up, and become one release when their noise is added.

The sums are held by the watches of the parameters, from the moment at which a backward has made them: they are never
in p.grad, so a loop may clear its gradients whenever it likes, and nothing can change them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from flashdp_compile.compat import sharded_like
from flashdp_compile.runtime.check import examine, refuse
from flashdp_compile.runtime.from_engine import FromEngine
from flashdp_compile.runtime.release import LEDGER, Owed, Release, ReleaseInfo
from flashdp_compile.runtime.shard_watch import ShardWatch
from flashdp_compile.runtime.watch import Content, Fault, Watch, find


class Sum(NamedTuple):
    """The clipped sum of a parameter, which has this place in its optimizer. `total` is contiguous: how a graph lays it
    out depends on the rank's batch, and what ranks add up is memory. `first`: of a parameter that is sharded, `total`
    is this rank's part of the sum over all ranks, behind so many elements; None for a sum of one rank."""

    place: int
    parameter: Tensor
    total: Tensor
    first: int | None = None


def sensitivity(release: Release) -> float:
    """What bounds the undivided sums of a backward, of all graphs that it ran together."""
    bounds: dict[object, float] = {}
    for peer in release.peers:
        if (owed := peer.info.owed) is not None:
            among = owed.from_engine.shared or peer
            bounds[among] = max(owed.sensitivity, bounds.get(among, 0.0))
    return math.sqrt(sum(bound**2 for bound in bounds.values()))


class LogicalBatch:
    """What the backward passes since the last release have left for the parameters of one optimizer.

    `divisor` is what their sums must have been divided by, `from_engine` what their graphs must have been handed, for
    whichever parts. `used` counts the batches of a loader that are behind it, for whoever draws samples.
    """

    def __init__(self, optimizer: Optimizer, divisor: float, from_engine: FromEngine) -> None:
        self._optimizer, self._divisor, self._from_engine = weakref.ref(optimizer), divisor, from_engine
        self.used = 0

    @property
    def optimizer(self) -> Optimizer:
        found = self._optimizer()
        assert found is not None
        return found

    def releases(self) -> list[Release]:
        """The backward passes whose sums are held, in their order; the first release of each.

        Raises UnprotectedGradientError, and forgets the logical batch, unless there is nothing else than sums that owe
        the same noise.
        """
        optimizer = self.optimizer
        found = examine(optimizer, held=True)
        owed = {release.info.owed for release in found.releases}
        several = any(release.part is None for release in found.releases) and len(owed) > 1
        first = {release.peers[0] for release in found.releases}
        several = several or len({sensitivity(release) for release in first}) > 1
        if several or any(one is None or not self._ours(one) for one in owed):
            found.faults.setdefault(Fault.FOREIGN, []).extend(found.holding)
        if found.faults:
            self.clear()
            refuse(optimizer, found)
        return sorted(first, key=lambda release: release.number)

    def take(self) -> list[Sum]:
        """The sums, which are held no more, and whose memory may be used."""
        found = []
        for place, parameter, watched in self._watches():
            if watched.held is not None:
                first = watched.first if isinstance(watched, ShardWatch) else None
                found.append(Sum(place, parameter, watched.held.total.contiguous(), first))
                watched.held = None
        return found

    def put(self, label: str, sums: Sequence[Sum], gradients: Sequence[Tensor]) -> None:
        """Puts what has become of sums into p.grad, as one release."""
        release = LEDGER.open(ReleaseInfo(label=label), alone=True)
        for (_, parameter, _, first), gradient in zip(sums, gradients, strict=True):
            watched = find(parameter)
            assert watched is not None
            parameter.grad = grad = gradient if first is None else sharded_like(gradient, parameter)
            watched.content = Content(grad, release, None, ())

    def _ours(self, owed: Owed) -> bool:
        return (owed.divisor, owed.from_engine._replace(parts=None)) == (self._divisor, self._from_engine)

    def parameters(self) -> list[Tensor]:
        """Those for which sums are held."""
        return [parameter for _, parameter, watched in self._watches() if watched.held is not None]

    def clear(self) -> None:
        """Forgets the sums."""
        for _, _, watched in self._watches():
            watched.drop()

    def _watches(self) -> Iterator[tuple[int, Tensor, Watch]]:
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        for index, parameter in enumerate(p for group in groups for p in group["params"]):
            if (watched := find(parameter)) is not None:
                yield index, parameter, watched
