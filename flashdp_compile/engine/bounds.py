"""Clipping bounds that move from step to step: along a quantile of the norms, or as was settled before the run.

Quantiles are those of Andrew, Thakkar, McMahan and Ramaswamy 2021 (arXiv 1905.03871), for every clipping group by
itself as in He et al. 2022 (arXiv 2212.01539). How the count of each step is paid for is in docs/accounting.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.checks import not_allowed, number
from flashdp_compile.runtime.bounds import FAR, BoundScales
from flashdp_compile.runtime.release import Release

Schedule = Callable[[int], float]
"""steps that are done -> what the bounds of the next one are multiplied by. It must know nothing of the data."""

AddNoise = Callable[[Tensor, float], Tensor]
"""(what samples have added up to, a deviation) -> the same with noise of that deviation."""


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """Bounds follow the norms: a step multiplies C_k by exp(-rate (w_k - target)), where w_k is the share of its
    samples whose norm was at most C_k, with noise.

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
        if not isinstance(how, Quantile) and not callable(how):
            raise not_allowed("bounds", how, "None, Quantile(...), or a function of the number of steps done")
        self._how, self._batch = how, expected_batch_size
        self.state = BoundScales()
        self._in_use = torch.ones(0)
        self.begin(0)

    @property
    def share(self) -> float:
        """What the counts take of each step's budget."""
        return self._how.share if isinstance(self._how, Quantile) else 0.0

    def begin(self, steps_done: int) -> None:
        """Where a run begins, or goes on; what follows a quantile goes on where it was."""
        if not isinstance(self._how, Quantile):
            self.state.load([self._scheduled(steps_done)])

    def told(self) -> str:
        """For a run that is resumed, which must say the same; nobody can tell functions apart."""
        return repr(self._how) if isinstance(self._how, Quantile) else "a schedule"

    def load(self, scales: Sequence[float] | None, steps_done: int) -> None:
        """Goes on where a run was saved."""
        if scales is not None:
            self.state.load(scales)
        self.begin(steps_done)

    def settle(self, releases: Sequence[Release], steps_done: int, sigma: float, add_noise: AddNoise) -> None:
        """At a step, which is counted already: keeps the scales that its backward passes had, and moves on."""
        scales = self.state.scales
        self._in_use = scales.clone()
        if not isinstance(self._how, Quantile):
            self.begin(steps_done)
            return
        votes = torch.stack([r.within for r in releases if r.within is not None]).sum(0)
        deviation = self._how.deviation(sigma, len(scales))
        within = add_noise(votes, deviation) / self._batch + 0.5
        scales.mul_(torch.exp(-self._how.rate * (within - self._how.target))).clamp_(1 / FAR, FAR)

    def in_use(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """The scales [K] that have divided the gradients of this step, and which of them is that of each parameter."""
        return self._in_use, [self.state.group_of(parameter) for parameter in parameters]

    def present(self) -> dict[str, float]:
        """C_k of the next step, by the name of the clipping group; empty before the first forward."""
        scales = self.state.scales.tolist()
        return (
            {name: bound * s for (name, bound), s in zip(self.state.groups.items(), scales, strict=True)}
            if scales
            else {}
        )

    def _scheduled(self, steps_done: int) -> float:
        factor = self._how(steps_done)  # type: ignore[operator]
        if not isinstance(factor, (int, float)) or not 1 / FAR <= factor <= FAR:
            raise not_allowed(f"bounds({steps_done})", factor, "a positive number")
        return float(factor)
