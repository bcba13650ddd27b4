"""Epsilon of steps that clip by estimates of the norms, from Gaussian probes, in place of the norms.

Ullah, Aketi, Devansh, Zhang, Razaviyayn, "Efficient DP-SGD for LLMs with Randomized Clipping" (ICML 2026, arXiv
2605.24879). What the noise has to cover is random then: docs/randomized_clipping.md has the theorem and its proof.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flashdp_compile.accounting.ratio_law import BOUNDS, FLAT, Groups, Law, worst_law
from flashdp_compile.accounting.sampling import Poisson, Sampling, Schedule
from flashdp_compile.accounting.step_profile import CONVEX_FROM, interval, loss_distribution
from flashdp_compile.checks import choice, integer, not_allowed, number
from flashdp_compile.errors import OptionError

NORMS = ("exact", "hutchinson", "hutch++")


@dataclass(frozen=True)
class Sketched:
    """Steps that take a sample with probability `rate` and clip by norms from `probes` Gaussian probes."""

    rate: float
    probes: int
    groups: Groups = FLAT
    bound: str = "convex"

    @property
    def convex(self) -> bool:
        return self.bound == "convex"

    @property
    def inflation(self) -> float:
        """By which noise grows, if there is much of it: the root of E k / chi2_k; of two probes or one, a guess."""
        return math.sqrt(self.probes / (self.probes - 2)) if self.probes > 2 else 8.0

    def law(self, sigma: float) -> Law:
        return worst_law(self.probes, self.groups, self.bound, 0.0 if self.convex else CONVEX_FROM / sigma**2)


def sketched(norm: str, probes: Any, groups: Any, bound: str, sampling: Sampling, accountant: str) -> Sketched | None:
    """What is known of the norms, None if they are exact. Raises OptionError where epsilon is not."""
    choice("norm", norm, NORMS)
    choice("bound", bound, BOUNDS)
    shares = _shares(groups)
    if norm == "exact":
        if probes is not None:
            raise OptionError(
                f"probes={probes!r}, but norm='exact' has none: name the norm that is estimated, 'hutchinson' or "
                "'hutch++', or leave probes out"
            )
        return None
    if probes is None:
        raise OptionError(
            f"probes is missing: norm={norm!r} estimates norms from so many Gaussian probes, and epsilon depends on "
            "how often the estimate is too small"
        )
    integer("probes", probes, 1)
    if accountant != "pld":
        raise OptionError(
            f"accountant={accountant!r} has no bound for norm={norm!r}: with some probability an estimate is smaller "
            "than the norm by any factor, so that Renyi divergences are infinite; allowed: 'pld'"
        )
    if not isinstance(sampling, Poisson):
        raise OptionError(
            f"sampling={sampling!r} is not covered for norm={norm!r}, whose bound is for one sample more or less of "
            "Poisson sampling; allowed: Poisson(...), or sample_rate"
        )
    return Sketched(sampling.rate, int(probes), shares, bound)


def _shares(groups: Any) -> Groups:
    """What a group may have of the squared bound, from their number or from their bounds."""
    if groups is None:
        return FLAT
    if isinstance(groups, Sequence) and not isinstance(groups, str):
        if not groups:
            raise not_allowed("groups", groups, "the number of groups that have equal bounds, or a list of bounds")
        squares = [number("groups", c, positive=True) ** 2 for c in groups]
        return tuple(sorted(Counter(square / math.fsum(squares) for square in squares).items()))
    count = integer("groups", groups, 1)
    return ((1 / count, count),)


def epsilon(parts: Schedule, norms: Sketched, delta: float) -> float:
    """Of a run whose noise multipliers and steps are `parts`, all of them positive."""
    spacing = min((_spacing(sigma, norms) for sigma, _ in parts), default=0.0)
    total = None
    for sigma, steps in parts:
        part = _one_step(sigma, norms, spacing).self_compose(steps)
        total = part if total is None else total.compose(part)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _spacing(sigma: float, norms: Sketched) -> float:
    return interval(sigma, norms.rate, norms.law(sigma), norms.convex)


@lru_cache(maxsize=8)  # 8 MB each at most
def _one_step(sigma: float, norms: Sketched, spacing: float) -> Any:
    return loss_distribution(sigma, norms.rate, norms.law(sigma), norms.convex, spacing)
