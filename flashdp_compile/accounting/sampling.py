"""How the samples of a step are drawn, and which event of dp-accounting that is.

sigma is the noise multiplier of `Options`: the noise's standard deviation over C, the longest gradient of one sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flashdp_compile.checks import integer, not_allowed

Schedule = Sequence[tuple[float, int]]
"""(noise multiplier, steps), one after the other."""

ADD_OR_REMOVE = "one sample more or less"
REPLACE = "one sample replaced by another"
ZERO_OUT = "one sample whose gradient counts as zero"


def rate(name: str, value: Any) -> float:
    """A probability of taking part, in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise not_allowed(name, value, "a number in (0, 1]: the share of the samples that a step expects to use")
    return float(value)


class Sampling:
    """A way to draw the samples of a step. A new one is a subclass."""

    adjacency: ClassVar[str] = ADD_OR_REMOVE
    accountants: ClassVar[tuple[str, ...]] = ("pld", "rdp")

    def releases(self, schedule: Schedule) -> Schedule:
        """(noise multiplier, number) of the releases that a sample may take part in, from those of the steps."""
        return schedule

    def event(self, sigma: float) -> Any:
        """One of them, as dp-accounting has it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Poisson(Sampling):
    """Every sample takes part in a step with probability `rate`, independently. Adjacency: one sample more or less.

    `sample_size`, the number of samples, has no part in epsilon; delta is compared with it.
    """

    rate: float
    sample_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", rate("rate", self.rate))
        integer("sample_size", self.sample_size, 1, optional=True)

    def event(self, sigma: float) -> Any:
        import dp_accounting as dp

        return dp.PoissonSampledDpEvent(self.rate, dp.GaussianDpEvent(sigma))


@dataclass(frozen=True)
class TruncatedPoisson(Sampling):
    """Poisson sampling of `sample_size` samples, of which a step keeps at most `cap`, chosen at random.

    Adjacency: one sample more or less. Whether another sample takes part then depends on this one, which the event
    accounts for (arXiv 2508.15089).
    """

    rate: float
    cap: int
    sample_size: int
    accountants = ("pld",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", rate("rate", self.rate))
        integer("cap", self.cap, 1)
        integer("sample_size", self.sample_size, 1)

    def event(self, sigma: float) -> Any:
        import dp_accounting as dp

        return dp.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self.sample_size,
            sampling_probability=self.rate,
            truncated_batch_size=self.cap,
            noise_multiplier=sigma,
        )


@dataclass(frozen=True)
class WithoutReplacement(Sampling):
    """Every step takes `batch_size` of `sample_size` samples, each such set as likely as another, anew in every step.

    Adjacency: one sample replaced by another, which moves a sum by 2 C (Wang, Balle, Kasiviswanathan 2019). A pass
    over shuffled data is not this: see Fixed.
    """

    batch_size: int
    sample_size: int
    adjacency = REPLACE
    accountants = ("rdp",)

    def __post_init__(self) -> None:
        integer("batch_size", self.batch_size, 1)
        integer("sample_size", self.sample_size, 1)
        if self.batch_size > self.sample_size:
            raise not_allowed("batch_size", self.batch_size, f"at most sample_size, {self.sample_size}")

    def event(self, sigma: float) -> Any:
        import dp_accounting as dp

        return dp.SampledWithoutReplacementDpEvent(self.sample_size, self.batch_size, dp.GaussianDpEvent(sigma / 2))


@dataclass(frozen=True)
class Fixed(Sampling):
    """Passes over the data in batches of a fixed size, shuffled or not: a sample takes part once in each pass.

    Nothing is gained from chance, so a pass of `steps_per_epoch` steps is one Gaussian mechanism for each sample, and
    one that has begun counts whole; under a schedule at the faintest noise of the pass. Adjacency: one sample whose
    gradient counts as zero; without it, all others would move to other batches.
    """

    steps_per_epoch: int
    adjacency = ZERO_OUT

    def __post_init__(self) -> None:
        integer("steps_per_epoch", self.steps_per_epoch, 1)

    def releases(self, schedule: Schedule) -> Schedule:
        """One for each pass."""
        return by_pass(schedule, self.steps_per_epoch)

    def event(self, sigma: float) -> Any:
        import dp_accounting as dp

        return dp.GaussianDpEvent(sigma)


def by_pass(schedule: Schedule, steps_per_epoch: int) -> list[tuple[float, int]]:
    """(the faintest noise of a pass, passes): a sample may take part in any step of each, shuffled or not."""
    found: list[tuple[float, int]] = []
    left = steps_per_epoch  # steps that the present pass still has
    for sigma, steps in schedule:
        if left < steps_per_epoch and steps > 0:  # goes on with a pass that has begun
            found[-1] = min(found[-1][0], sigma), 1
            begun = min(left, steps)
            left, steps = left - begun or steps_per_epoch, steps - begun
        whole, rest = divmod(steps, steps_per_epoch)
        found += [(sigma, whole)] * (whole > 0) + [(sigma, 1)] * (rest > 0)
        left = steps_per_epoch - rest if rest else left
    runs = itertools.groupby(found, key=lambda part: part[0])
    return [(sigma, sum(passes for _, passes in same)) for sigma, same in runs]
