"""Clipping bounds that move from step to step: along a quantile of the norms, or as was settled before the run.

Quantiles are those of Andrew, Thakkar, McMahan and Ramaswamy 2021 (arXiv 1905.03871), for every clipping group by
itself as in He et al. 2022 (arXiv 2212.01539). How the count of each step is paid for is in docs/accounting.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.checks import not_allowed, number
from flashdp_compile.runtime.bounds import FAR, BoundScales
from flashdp_compile.runtime.release import Release

Schedule = Callable[[int], float]
"""steps that are done -> what the bounds of the next one are multiplied by. It must know nothing of the data."""

Saved = Sequence[float] | Mapping[str, float]
"""The scales of a run that is resumed, by the names of its groups; one for all, or in their order, if it had none."""

AddNoise = Callable[[Tensor, float], Tensor]
"""(what samples have added up to, a deviation) -> the same with noise of that deviation."""


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """Bounds follow the norms: a step multiplies C_k by exp(-rate (w_k - target)), where w_k is the share of its
    samples whose norm was at most C_k, with noise. Half of those without a gradient count as such, as they may be
    padding: where they are a share z of a group's samples, only targets within z / 2 .. 1 - z / 2 can be met.

    target   the share of samples that are to stay unclipped
    rate     how far a step may move a bound
    share    of the step's budget: the gradients' noise is sigma / sqrt(1 - share), and the rest of sigma's guarantee
             pays for the count
    """

    target: float = 0.5
    rate: float = 0.2
    share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("target", "share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise not_allowed(name, value, "a number between 0 and 1")
        number("rate", self.rate, positive=True)

    def deviation(self, sigma: float, groups: int) -> float:
        """Of the noise on the votes of so many groups, each of which one sample moves by 1/2: sqrt(groups) / 2 over it
        is the square root of `share` of 1 / sigma."""
        return sigma * math.sqrt(groups / self.share) / 2


class MovingBounds:
    """The bounds of a run, for a logical batch of `expected_batch_size` samples."""

    def __init__(self, how: Quantile | Schedule, expected_batch_size: int) -> None:
        if not isinstance(how, Quantile) and (not callable(how) or isinstance(how, type)):
            raise not_allowed("bounds", how, "None, Quantile(...), or a function of the number of steps done")
        self._how, self._batch = how, expected_batch_size
        self.state = BoundScales()

    @property
    def share(self) -> float:
        """What the counts take of each step's budget."""
        return self._how.share if isinstance(self._how, Quantile) else 0.0

    def told(self) -> str:
        """For a run that is resumed, which must say the same; nobody can tell functions apart."""
        return repr(self._how) if isinstance(self._how, Quantile) else "a schedule"

    def begin(self, steps_done: int | None, scales: Saved | None = None) -> None:
        """Where a run begins, or goes on: with the `scales` that were saved, or with those of the schedule, which says
        nothing of what is behind the last step (None)."""
        if not isinstance(self._how, Quantile):
            self.state.load([1.0 if steps_done is None else self.scheduled(steps_done)])
        else:
            self.state.load([1.0] if scales is None else scales)

    def scheduled(self, steps_done: int) -> float:
        """What a schedule says of the step behind so many; 1 without one.

        Raises OptionError if it says nothing that can be.
        """
        if isinstance(self._how, Quantile):
            return 1.0
        found = self._how(steps_done)
        try:
            factor = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError):
            factor = math.nan
        if not 1 / FAR <= factor <= FAR:
            raise not_allowed(f"bounds({steps_done})", found, "a number within 2^-60 .. 2^60")
        return factor

    def wrong(self, releases: Sequence[Release], parameters: Iterable[Tensor]) -> str:
        """Why these backward passes are no logical batch, in the words of an error; empty if they are one."""
        if len({release.moved.moves for release in _of_all_parts(releases) if release.moved is not None}) != 1:
            return "bounds have moved between them: the optimizers of a model step together when bounds move"
        if any(self.state.group_of(parameter) is None for parameter in parameters):
            return (
                "a parameter has taken the place of one that was compiled, and bounds that move know only that: call "
                "torch.compiler.reset() first"
            )
        return ""

    def settle(self, releases: Sequence[Release], factor: float, sigma: float, add_noise: AddNoise) -> None:
        """At a step that is counted already: moves on, by the votes of its backward passes, each of which is used but
        once, or to `factor`, which is scheduled for the next. `add_noise` also adds up over all ranks."""
        if not isinstance(self._how, Quantile):
            self.state.load([factor])
            return
        votes = torch.zeros_like(self.state.scales)
        for release in _of_all_parts(releases):
            if release.moved is not None:
                votes += release.moved.votes
                release.moved = release.moved._replace(votes=torch.zeros_like(votes))
        within = add_noise(votes, self._how.deviation(sigma, len(votes))) / self._batch + 0.5
        self.state.move(torch.exp(-self._how.rate * (within - self._how.target)))

    def undone(self, release: Release, parameters: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """The scales [K] that have divided the gradients of a step, and which of them is that of each parameter."""
        assert release.moved is not None
        numbers = []
        for parameter in parameters:
            number = self.state.group_of(parameter)
            assert number is not None  # `wrong` has refused it
            numbers.append(number)
        return release.moved.scales, numbers

    def present(self) -> dict[str, float]:
        """C_k of the next step, by the name of the clipping group; empty before the first forward."""
        if not self.state.groups:
            return {}
        scales = self.state.scales.tolist()
        return {name: bound * s for (name, bound), s in zip(self.state.groups.items(), scales, strict=True)}


def _of_all_parts(releases: Sequence[Release]) -> list[Release]:
    """Where a model is compiled part by part, a backward pass makes a release of each part, once (parts.py has seen to
    it), and is known by one of them."""
    return [peer for release in releases for peer in release.peers]
