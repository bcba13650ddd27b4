"""What a step of an attached optimizer does: one release of a whole logical batch, or nothing yet, or an error."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from flashdp_compile.compat import local_shard
from flashdp_compile.engine.bounds import MovingBounds
from flashdp_compile.engine.budget import Budget
from flashdp_compile.engine.loader import EngineLoader
from flashdp_compile.engine.noise import Noise
from flashdp_compile.engine.ranks import Ranks
from flashdp_compile.errors import UnprotectedGradientError
from flashdp_compile.runtime.from_engine import FromEngine
from flashdp_compile.runtime.logical import LogicalBatch, Sum, sensitivity
from flashdp_compile.runtime.release import Release
from flashdp_compile.runtime.seen_samples import distinguishing

STREAMS = 1 << 20  # of one optimizer
COUNTS = STREAMS - 1  # the stream for who lies within a bound


class Steps:
    """The steps of one run. `noise` is one of those in noise.py; without a `loader`, `micro_batches` backward passes
    make a logical batch. `stepped`: whether the last call took a step, or kept the sum of a micro-batch."""

    def __init__(
        self,
        ranks: Ranks,
        budget: Budget,
        noise: Noise,
        micro_batches: int,
        bounds: MovingBounds | None,
        from_engine: FromEngine,
    ) -> None:
        self.noise, self.stepped = noise, False
        self.loader: EngineLoader | None = None
        self._ranks, self._budget, self._micro_batches = ranks, budget, micro_batches
        self._bounds, self._from_engine = bounds, from_engine
        self._names = WeakIdKeyDictionary()  # of the parameters of models
        self._equal: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whose parameters are the same on all ranks
        self._attached: weakref.WeakKeyDictionary[Optimizer, LogicalBatch] = weakref.WeakKeyDictionary()
        self._numbers = 0
        self._accounted: set[Release] = set()  # the backward passes of the last step
        self._drawn: set[int] = set()  # the optimizers that have drawn noise in it

    def __contains__(self, optimizer: Optimizer) -> bool:
        return optimizer in self._attached

    def attach(self, optimizer: Optimizer, divisor: float) -> Callable[[Callable[[], Any]], None]:
        """What takes the place of the optimizer's own step, and is given that."""
        self._attached[optimizer] = logical = LogicalBatch(optimizer, divisor, self._from_engine)
        number, self._numbers = self._numbers, self._numbers + 1
        return lambda original: self._step(number, logical, original)

    def learn_names(self, model: nn.Module) -> None:
        """What the parameters of a compiled model are called: graphs may be shared, and then name those of one model
        alone."""
        for name, parameter in model.named_parameters():
            self._names[parameter] = name

    def compare_again(self) -> None:
        """The next step makes sure that ranks have the same parameters and other samples, as the first one did."""
        self._equal.clear()
        if self._from_engine.seen is not None:
            self._from_engine.seen.wanted = True

    def draw_anew(self) -> None:
        """The loader is iterated: what an iteration before it has left unfinished is drawn anew."""
        for logical in self._attached.values():
            logical.clear()
            logical.used = 0 if self.loader is None else len(self.loader.handed_out)

    def _step(self, number: int, logical: LogicalBatch, original: Callable[[], Any]) -> None:
        self.stepped = False
        try:
            with self._ranks.together():
                releases = self._complete_batch(logical)
                if not releases:
                    return
                count, settled = self._account(number, releases)
                sums = logical.take()
            self._agree(number, logical, releases, sums, settled)
            self._compare_beginnings(logical.optimizer, releases, sums)
            with self._ranks.behind_agreement():
                count()
                gradients = self._released(number, releases[0], sums)
                logical.put(f"step {self._budget.steps_done} of the engine", sums, gradients)
        except BaseException:
            self._forget(logical)
            raise
        with self._ranks.behind_agreement():
            original()
        self.stepped = True

    def _agree(
        self, number: int, logical: LogicalBatch, releases: Sequence[Release], sums: Sequence[Sum], settled: float
    ) -> None:
        """Returns once all ranks are at this step, with sums of the same parameters in the same order, of samples from
        the same draw, and if they will move bounds alike."""
        if self._ranks.size == 1:
            return
        drawn = "" if self.loader is None else f" in {self.loader.drawn(logical.used)}"
        bounds = "" if self._bounds is None else f"; the next step's bounds: times {settled}"
        told = [
            (one.place, self._names.get(one.parameter), *one.parameter.shape, one.total.dtype, one.first is None)
            for one in sums
        ]
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
        self._ranks.agree(
            "a step",
            f"of optimizer {number}, behind {self._budget.steps_done} steps and {logical.used} micro-batches of the "
            f"loader{drawn}, with sums for {len(sums)} parameters (names, order and shapes: {digest}) of sensitivity "
            f"{sensitivity(releases[0]):.9g}{bounds}",
        )

    def _compare_beginnings(self, optimizer: Optimizer, releases: Sequence[Release], sums: Sequence[Sum]) -> None:
        """At a first step, or behind a state that was loaded: makes sure that ranks have the same parameters, and that
        no two of them were given the same samples."""
        if optimizer not in self._equal:
            self._ranks.check_values({self._described(one): local_shard(one.parameter) for one in sums})
            self._equal.add(optimizer)
        seen = self._from_engine.seen
        if seen is not None and seen.wanted:
            graphs = (peer for release in releases for peer in release.peers)  # of all parts: one has positions alone
            self._ranks.check_other_samples(distinguishing(one for peer in graphs for one in peer.seen))
            seen.wanted = False

    def _released(self, number: int, release: Release, sums: Sequence[Sum]) -> list[Tensor]:
        """What becomes of the clipped sums, to which this release and others have added. Sums of one rank are added up
        over all, and noise is added to those that have come while others are on their way."""
        if any(one.first is not None for one in sums):
            assert all(one.first is not None for one in sums), "parts of a model are compiled as a whole"
            return self._noised(number, release, sums)
        found: dict[int, Tensor] = {}
        for wave in self._ranks.adding_up([one.total for one in sums]):
            noised = self._noised(number, release, [sums[at] for at in wave])
            found.update(zip(wave, noised, strict=True))
        return [found[at] for at in range(len(sums))]

    def _noised(self, number: int, release: Release, sums: Sequence[Sum]) -> list[Tensor]:
        owed = release.info.owed
        assert owed is not None
        std = self._sigma_of_gradients() * sensitivity(release) / owed.divisor
        assert all(one.place < COUNTS for one in sums)
        streams, totals = [number * STREAMS + one.place for one in sums], [one.total for one in sums]
        moved = () if self._bounds is None else self._bounds.undone(release, [one.parameter for one in sums])
        shards: dict[str, Any] = {"offsets": [one.first or 0 for one in sums]} if any(one.first for one in sums) else {}
        return self.noise.add(totals, self._budget.steps_done, streams, std, *moved, **shards)

    def _sigma(self) -> float:
        """Of the step that is counted last."""
        return self._budget.plan.sigma(self._budget.steps_done - 1)

    def _sigma_of_gradients(self) -> float:
        return self._sigma() if self._bounds is None else self._bounds.sigma_of_gradients(self._sigma())

    def _account(self, number: int, releases: Sequence[Release]) -> tuple[Callable[[], None], float]:
        """Makes sure that a step can be taken. Optimizers share one if they share its backward passes; each draws once
        in it. Gives what counts it, to be called once all ranks are sure: one that is not takes no step of the others;
        and what is settled of the bounds of the next step.
        """
        if number not in self._drawn and set(releases) <= self._accounted:
            return lambda: self._drawn.add(number), 1.0
        left = self._budget.steps_left
        last = left is not None and left <= 1  # behind which nothing is scheduled
        settled = 1.0 if self._bounds is None or last else self._bounds.settled(self._budget.steps_done + 1)
        self._budget.reserve()

        def add_noise(votes: Tensor, std: float) -> Tensor:
            self._ranks.add_up([votes])
            (noised,) = self.noise.add([votes], self._budget.steps_done, [number * STREAMS + COUNTS], std)
            return noised

        def count() -> None:
            self._budget.spend()
            if self._from_engine.probes is not None:
                self._from_engine.probes.move()
            self._accounted, self._drawn = set(releases), {number}
            if self._bounds is not None:
                self._bounds.move(releases, settled, self._sigma(), add_noise)

        return count, settled

    def _complete_batch(self, logical: LogicalBatch) -> list[Release]:
        """The backward passes of a logical batch that is complete; none if more are to come.

        Raises UnprotectedGradientError if one is missing, or one too many.
        """
        releases = logical.releases()
        if self.loader is not None:
            places, wrong = self.loader.used_by(releases, logical.used)
            whole = bool(places) and self.loader.handed_out[places[-1]].last
        elif not self._budget.plan.own_sampling:
            raise UnprotectedGradientError(
                "the samples of this step were not drawn by a loader of this engine, whose accountant assumes Poisson "
                "sampling. Iterate engine.data_loader(...), or say by sampling= how samples are drawn"
            )
        else:
            whole, wrong = len(releases) == self._micro_batches, ""
            if not 0 < len(releases) <= self._micro_batches:
                wrong = f"a step is made of {self._micro_batches} (micro_batches)"
        if not wrong and whole and self._bounds is not None:
            wrong = self._bounds.wrong(releases, logical.parameters())
        if not wrong and not set(releases) <= self._accounted:
            wrong = self._spent_probes(releases)
        if wrong:
            raise UnprotectedGradientError(
                f"this step holds {len(releases)} backward passes through the compiled model, but {wrong}. A trainer "
                "accumulates nothing itself (gradient_accumulation_steps=1). Nothing was released, and the next "
                "logical batch begins anew"
            )
        if whole and self.loader is not None:
            logical.used = places[-1] + 1
        return releases if whole else []

    def _spent_probes(self, releases: Sequence[Release]) -> str:
        """What is wrong with backward passes whose probes were not those of this step alone."""
        if all(release.probes_moved == self._from_engine.probes_moved for release in releases):
            return ""
        return (
            "another step of this engine has been taken since, which has used up the probes that norms were estimated "
            "with: take each step before the next model's backward"
        )

    def _forget(self, logical: LogicalBatch) -> None:
        """Begins anew with what the loader hands out next."""
        logical.clear()
        if self.loader is not None:
            logical.used = max(len(self.loader.handed_out) - self.loader.read_ahead, logical.used)

    def _described(self, one: Sum) -> str:
        """Which parameter this is, or which of its elements this rank has."""
        name = self._names.get(one.parameter) or f"parameter {one.place}"
        whole = one.first is None
        return name if whole else f"the elements of {name} from {one.first} on, {one.total.numel()} in number"
