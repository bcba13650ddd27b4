"""Epsilon of a run, and the noise that keeps a run within an epsilon, by Google's dp-accounting.

A run is a number of releases, one for each optimizer step. Its noise may follow a schedule; a schedule of the clipping
bound changes nothing here, as the noise is a multiple of the bound. Norms that are only estimated do (`randomized`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from scipy.optimize import brentq

from flashdp_compile.accounting import randomized
from flashdp_compile.accounting.sampling import REPLACE, Poisson, Sampling, Schedule, TruncatedPoisson
from flashdp_compile.checks import choice, integer, not_allowed, number
from flashdp_compile.errors import OptionError

ACCOUNTANTS = ("pld", "rdp")
FAINTEST, LOUDEST = 0.05, 2.0**20  # noise multipliers that are searched
CLOSE = 1e-6  # how near, relative to it, the calibrated multiplier is to the least that meets the target


def epsilon(
    *,
    noise_multiplier: float | Schedule,
    delta: float,
    steps: int | None = None,
    sample_rate: float | None = None,
    sampling: Sampling | None = None,
    accountant: str = "pld",
    norm: str = "exact",
    probes: int | None = None,
    groups: int | Sequence[float] | None = None,
    bound: str = "convex",
) -> float:
    """The epsilon at `delta` of a run of `steps` steps; infinite where there is none.

    `sample_rate` stands for `sampling=Poisson(sample_rate)`. A schedule brings its own steps. "pld" (privacy loss
    distributions) is the tightest; "rdp" (Renyi) is known for more samplings.

    Args:
        norm: "exact", or "hutchinson" or "hutch++", by which norms are estimated: Poisson sampling and "pld" only.
        probes: Gaussian probes of the layer that has the fewest, of those that have any; of Hutch++ those of its tail.
        groups: of clipping, each with probes of its own: their number, if their bounds are equal, or their bounds.
        bound: "convex", or the paper's "envelope", which asks for a little more noise.

    Raises:
        OptionError: a value is not allowed, or two contradict each other.
    """
    how = _sampling(sampling, sample_rate)
    _delta(delta, how)
    total = _accountant(accountant, how)
    norms = randomized.sketched(norm, probes, groups, bound, how, accountant)
    releases = [(sigma, count) for sigma, count in how.releases(schedule(noise_multiplier, steps)) if count > 0]
    for sigma, _ in releases:
        if sigma == 0:
            return math.inf
    if norms is not None:
        return randomized.epsilon(releases, norms, delta)
    for sigma, count in releases:
        total.compose(how.event(sigma), count)
    return float(total.get_epsilon(delta))


def noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    steps: int,
    sample_rate: float | None = None,
    sampling: Sampling | None = None,
    accountant: str = "pld",
    norm: str = "exact",
    probes: int | None = None,
    groups: int | Sequence[float] | None = None,
    bound: str = "convex",
) -> float:
    """The least noise multiplier, to one part in a million and never below it, with which a run of `steps` steps stays
    within `target_epsilon` at `delta`. The other arguments are those of `epsilon`.

    Raises:
        OptionError: a value is not allowed, two contradict each other, or no noise reaches the target.
    """
    number("target_epsilon", target_epsilon, positive=True)
    how = _sampling(sampling, sample_rate)
    _delta(delta, how)
    norms = randomized.sketched(norm, probes, groups, bound, how, accountant)
    if integer("steps", steps, 0) == 0:
        return 0.0
    run: dict[str, Any] = {"steps": steps, "delta": delta, "sampling": how, "accountant": accountant}
    run |= {"norm": norm, "probes": probes, "groups": groups, "bound": bound}

    def excess(log_sigma: float) -> float:
        """Logarithm of what is spent over what may be, finite for every noise."""
        found = epsilon(noise_multiplier=max(math.exp(log_sigma), FAINTEST), **run)
        return math.log(min(max(found, 1e-12), 1e12) / target_epsilon)

    guess = math.log(_guess(target_epsilon, delta, steps, how) * (1.0 if norms is None else norms.inflation))
    faintest = math.log(FAINTEST)
    low, high = max(guess - 0.2, faintest), guess + 0.02
    while excess(high) > 0:
        low, high = high, high + 2 * (high - low)
        if high > math.log(LOUDEST):
            raise OptionError(
                f"target_epsilon={target_epsilon!r} cannot be reached in {steps} steps at delta={delta!r}: a noise "
                f"multiplier of {LOUDEST:.0f} is not enough. Allow a larger epsilon or delta, or fewer steps"
            )
    while excess(low) <= 0:
        if low == faintest:
            return FAINTEST
        low, high = max(low - 0.5, faintest), low
    found = brentq(excess, low, high, xtol=CLOSE / 4, rtol=1e-15)
    while excess(found) > 0:  # the root may lie on either side
        found += CLOSE / 4
    return math.exp(found)


def schedule(noise: float | Schedule, steps: int | None) -> list[tuple[float, int]]:
    """The noise of a run as pairs (noise multiplier, steps). Raises OptionError if it is not allowed."""
    if isinstance(noise, Sequence) and not isinstance(noise, str):
        if not all(isinstance(part, Sequence) and len(part) == 2 for part in noise):
            raise not_allowed("noise_multiplier", noise, "a number, or a list of pairs (noise multiplier, steps)")
        found = [(_sigma(s), integer("steps", n, 0)) for s, n in noise]
        if steps is not None and steps != sum(n for _, n in found):
            raise not_allowed("steps", steps, f"None, or {sum(n for _, n in found)}, the steps of the schedule")
        return found
    if steps is None:
        raise OptionError("steps is missing: the number of optimizer steps, each of which is one release")
    return [(_sigma(noise), integer("steps", steps, 0))]


def _sigma(value: Any) -> float:
    sigma = number("noise_multiplier", value, positive=False)
    if 0 < sigma < FAINTEST:
        raise OptionError(
            f"noise_multiplier={sigma!r} is less than {FAINTEST}, where epsilon is beyond any use: take 0 for a run "
            "that is not private"
        )
    return sigma


def _guess(target: float, delta: float, steps: int, how: Sampling) -> float:
    """Near the noise that is looked for, from the accountant that is quick."""
    if not isinstance(how, (Poisson, TruncatedPoisson)):
        return 1.0
    from dp_accounting import rdp

    low, high = math.log(FAINTEST), math.log(LOUDEST)
    while high - low > 0.01:
        middle = (low + high) / 2
        quick = rdp.RdpAccountant(orders=[*range(2, 64), 128, 256, 512])
        quick.compose(Poisson(how.rate).event(math.exp(middle)), steps)
        enough = quick.get_epsilon(delta) <= target
        low, high = (low, middle) if enough else (middle, high)
    return math.exp(high)


def _sampling(sampling: Sampling | None, sample_rate: float | None) -> Sampling:
    if (sampling is None) == (sample_rate is None):
        raise OptionError(
            "give either sample_rate, the probability with which Poisson sampling takes a sample into a step, or "
            "sampling, which says how samples are drawn; " + ("none" if sampling is None else "both") + " is given"
        )
    if sampling is None:
        assert sample_rate is not None
        return Poisson(sample_rate)
    if not isinstance(sampling, Sampling):
        raise not_allowed("sampling", sampling, ", ".join(f"{c.__name__}(...)" for c in Sampling.__subclasses__()))
    return sampling


def _delta(delta: Any, how: Sampling) -> None:
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise not_allowed("delta", delta, "a number between 0 and 1, well below one over the number of samples")
    size = getattr(how, "sample_size", None)
    if size is not None and delta >= 1 / size:
        warnings.warn(
            f"delta={delta!r} is at least one over the number of samples ({size}): publishing a sample at random would "
            "be allowed by it. Choose a smaller one.",
            stacklevel=3,
        )


def _accountant(name: str, how: Sampling) -> Any:
    choice("accountant", name, ACCOUNTANTS)
    if name not in how.accountants:
        raise OptionError(
            f"accountant={name!r} knows no bound for {type(how).__name__} sampling; allowed: "
            f"{', '.join(how.accountants)}"
        )
    from dp_accounting import NeighboringRelation, pld, rdp

    if name == "pld":
        return pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    relation = NeighboringRelation.REPLACE_ONE if how.adjacency == REPLACE else NeighboringRelation.ADD_OR_REMOVE_ONE
    return rdp.RdpAccountant(neighboring_relation=relation)
