"""The engine's loader, which knows what it has handed out, and tells every forward what it may be working on."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flashdp_compile.accounting import Poisson, TruncatedPoisson
from flashdp_compile.checks import integer
from flashdp_compile.data import PoissonSampler, PrivateLoader
from flashdp_compile.data.loader import rows
from flashdp_compile.data.sampler import Part
from flashdp_compile.engine.plan import Plan
from flashdp_compile.engine.ranks import Ranks
from flashdp_compile.errors import OptionError
from flashdp_compile.runtime.release import LEDGER, Release

_log = logging.getLogger("flashdp_compile")
_tokens = itertools.count()  # names of loaders: unlike an id, never used again
UNLIMITED = 2**31 - 1  # steps of a loader
REMEMBERED = 1000  # micro-batches, by the backward that used them


class HandedOut(NamedTuple):
    """A micro-batch: of which logical batch of which iteration, and whether it ends it."""

    iteration: int
    logical: int
    last: bool


class EngineLoader(PrivateLoader):
    """`read_ahead` is how many batches a training loop takes before it uses them. `begins` is called when the loader is
    iterated, again or for the first time: a logical batch that was cut short is drawn anew then."""

    def __init__(self, *args: Any, begins: Callable[[], None], read_ahead: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.read_ahead = integer("read_ahead", read_ahead, 0)
        self.handed_out: list[HandedOut] = []
        self._begins = begins
        self._token = next(_tokens)
        self._users: dict[int, Release] = {}

    def __iter__(self) -> Iterator[Any]:
        if self.steps_done == self.sampler.steps:
            _log.warning("flashdp: the loader has nothing left: one iteration of it is the whole run, all epochs of it")
        self._begins()
        return super().__iter__()

    def _handed_out(self, batch: Any, size: int) -> Any:
        self.handed_out.append(HandedOut(self._iteration, self.steps_done - self.last, self.last))
        LEDGER.batch = {**LEDGER.batch, self._token: len(self.handed_out) - 1}
        return super()._handed_out(batch, size)

    def drawn(self, used: int) -> str:
        """Of which draw the batch is that was used last: ranks share one only if it is the same on all of them."""
        return f"iteration {self.sampler.iterations} of it, in logical batch {self.handed_out[used - 1].logical}"

    def used_by(self, releases: Sequence[Release], used: int) -> tuple[list[int], str]:
        """The places among `handed_out` of the micro-batches that these backward passes went through, which must be all
        of their logical batch so far; and what is wrong, if anything is. `used` batches are behind the loop."""
        found = [release.batch.get(self._token, -1) for release in releases]
        if self.read_ahead:  # a forward only knows how far the loop had read: passes come in order
            told, found = found, list(range(used, used + len(releases)))
            if any(not at <= t <= at + self.read_ahead for t, at in zip(told, found, strict=True)):
                return [], self._said(len(self.handed_out) - used)
        if not found or -1 in found:
            return [], self._said(max(len(self.handed_out) - self.read_ahead - used, 0))
        expected = self._logical_batch(found[-1])
        if found != expected or len(self.handed_out) - 1 - found[-1] > self.read_ahead:
            return [], self._said(len(self._logical_batch(len(self.handed_out) - 1 - self.read_ahead)))
        for place, release in zip(found, releases, strict=True):
            if self._users.setdefault(place, release) is not release:
                return (
                    [],
                    "another backward has used these samples already: two releases of them are one step of less noise",
                )
        if len(self._users) > REMEMBERED:
            self._users = {place: user for place, user in self._users.items() if place >= found[0] - REMEMBERED // 2}
        return found, ""

    def _logical_batch(self, place: int) -> list[int]:
        """The places of a logical batch up to this one."""
        mine, first = self.handed_out[place], place
        while first and self.handed_out[first - 1][:2] == mine[:2]:
            first -= 1
        return list(range(first, place + 1))

    def _said(self, count: int) -> str:
        several = "1 micro-batch" if count == 1 else f"{count} micro-batches"
        return f"the loader has handed out {several} for them, each of which goes through one forward and one backward"


def make_loader(
    dataset: Any,
    plan: Plan,
    ranks: Ranks,
    seed: int | None,
    *,
    physical_batch_size: int | None,
    pad: bool,
    read_ahead: int,
    begins: Callable[[], None],
    **dataloader_options: Any,
) -> EngineLoader:
    """This rank's part of the logical batches of a plan, which all ranks draw together.

    Raises OptionError if somebody else draws the samples, or the plan is that of other data.
    """
    how = plan.sampling
    if plan.own_sampling or not isinstance(how, (Poisson, TruncatedPoisson)):
        raise OptionError("sampling is given, which says that samples are drawn elsewhere: leave it out")
    with ranks.together():
        if (count := rows(dataset)) != how.sample_size:
            raise OptionError(f"dataset has {count} rows, but sample_size={how.sample_size}")
        told = {"physical_batch_size": physical_batch_size, "pad": pad, "read_ahead": read_ahead}
        ranks.agree("the loader's arguments", told)
    sampler = PoissonSampler(
        count,
        how.rate,
        steps=UNLIMITED if plan.steps is None else plan.steps,
        physical_batch_size=physical_batch_size,
        cap=how.cap if isinstance(how, TruncatedPoisson) else None,
        seed=seed,
        least=2 if plan.norms and not pad else 1,  # a graph of one sample has exact norms
        part=Part(ranks.rank, ranks.size, int.from_bytes(ranks.secret(16), "little")),
    )
    return EngineLoader(dataset, sampler, pad=pad, read_ahead=read_ahead, begins=begins, **dataloader_options)
