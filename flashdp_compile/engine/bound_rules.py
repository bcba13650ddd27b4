"""How clipping bounds move from step to step: along a quantile of the norms, or as was settled before the run; and what
a step's budget pays for it.

Quantiles are those of Andrew, Thakkar, McMahan and Ramaswamy 2021 (arXiv 1905.03871), for every clipping group by
itself as in He et al. 2022 (arXiv 2212.01539). How the count of each step is paid for is in docs/accounting.md.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.checks import not_allowed, number
from flashdp_compile.runtime.bounds import FAR, BoundScales

Schedule = Callable[[int], float]
"""steps that are done -> what the bounds of the next one are multiplied by. It must know nothing of the data."""

Saved = Sequence[float] | Mapping[str, float]
"""The scales of a run that is resumed, by the names of its groups; one for all, or in their order, if it had none."""


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


def sigma_of_gradients(sigma: float, share: float) -> float:
    """What is left for the gradients of a step that is accounted for with sigma, where votes take this share of it."""
    return sigma / math.sqrt(1 - share)


def deviation_of_votes(sigma: float, share: float, groups: int) -> float:
    """Of the noise on the votes of so many groups, each of which one sample moves by 1/2: sqrt(groups) / 2 over it is
    the square root of `share` of 1 / sigma."""
    return sigma * math.sqrt(groups / share) / 2


def accounted_groups(share: float, groups: int) -> int | list[float]:
    """What an accountant of estimated norms is told of so many groups of gradients, and of votes (1 / sigma of each
    release, over that of the step), which are a release of their own."""
    return [math.sqrt((1 - share) / groups)] * groups + [math.sqrt(share)] if share else groups


class Rule(abc.ABC):
    """How bounds move. `share`: what a step's budget pays for it, 0 for what knows nothing of the data."""

    share: float

    @abc.abstractmethod
    def told(self) -> str:
        """For a run that is resumed, which must say the same."""

    @abc.abstractmethod
    def first(self, steps_done: int | None, saved: Saved | None) -> Saved:
        """The scales with which a run begins behind so many steps, or goes on with what was saved. None: behind the
        last one."""

    @abc.abstractmethod
    def settled(self, steps_done: int) -> float:
        """What is known beforehand of the bounds of the step behind so many: what they are multiplied by."""

    @abc.abstractmethod
    def move(self, state: BoundScales, settled: float, within: Callable[[], Tensor]) -> None:
        """Behind a step. `within()` takes its votes: the share of samples [K] within each bound, with the noise that
        `share` pays for."""


class _Voted(Rule):
    def __init__(self, how: Quantile) -> None:
        self._how, self.share = how, how.share

    def told(self) -> str:
        return repr(self._how)

    def first(self, steps_done: int | None, saved: Saved | None) -> Saved:
        return [1.0] if saved is None else saved

    def settled(self, steps_done: int) -> float:
        return 1.0

    def move(self, state: BoundScales, settled: float, within: Callable[[], Tensor]) -> None:
        state.move(torch.exp(-self._how.rate * (within() - self._how.target)))


class _Scheduled(Rule):
    share = 0.0

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def told(self) -> str:
        return "a schedule"  # nobody can tell functions apart

    def first(self, steps_done: int | None, saved: Saved | None) -> Saved:
        return [1.0 if steps_done is None else self.settled(steps_done)]

    def settled(self, steps_done: int) -> float:
        found = self._schedule(steps_done)
        try:
            factor = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError):
            factor = math.nan
        if not 1 / FAR <= factor <= FAR:
            raise not_allowed(f"bounds({steps_done})", found, "a number within 2^-60 .. 2^60")
        return factor

    def move(self, state: BoundScales, settled: float, within: Callable[[], Tensor]) -> None:
        state.load([settled])


def rule_of(bounds: Quantile | Schedule) -> Rule:
    """Raises OptionError for what is neither."""
    if isinstance(bounds, Quantile):
        return _Voted(bounds)
    if not callable(bounds) or isinstance(bounds, type):
        raise not_allowed("bounds", bounds, "None, Quantile(...), or a function of the number of steps done")
    return _Scheduled(bounds)
