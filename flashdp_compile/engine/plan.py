"""What a run may spend: the sampling, the noise multiplier and the number of steps, from what the user has said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashdp_compile import accounting
from flashdp_compile.accounting import Poisson, Sampling, Schedule, TruncatedPoisson
from flashdp_compile.checks import integer, not_allowed, number
from flashdp_compile.errors import OptionError


@dataclass(frozen=True)
class Plan:
    """`steps` is the last step that the run may take; None if nothing limits it. `own_sampling`: whether the user draws
    the samples, and not a loader of the engine. `norms`: what the accountant is told about norms that are estimated."""

    sampling: Sampling
    own_sampling: bool
    noise_multiplier: float | Schedule
    steps: int | None
    delta: float
    target_epsilon: float | None
    accountant: str
    norms: Mapping[str, Any] = field(default_factory=dict)

    def epsilon(self, steps: int, delta: float | None = None) -> float:
        """What a run of so many steps has spent."""
        if steps == 0:
            return 0.0
        return accounting.epsilon(
            noise_multiplier=self._until(steps),
            delta=self.delta if delta is None else delta,
            sampling=self.sampling,
            accountant=self.accountant,
            **self.norms,
        )

    def inflation(self) -> float:
        """sigma over that which the whole run would need for the same epsilon if its norms were exact.

        Raises OptionError for a run without an end, or with a schedule of noise.
        """
        if not self.norms:
            return 1.0
        if self.steps is None or not isinstance(self.noise_multiplier, float):
            raise OptionError("what estimates cost is known for a number of steps with one noise multiplier")
        exact = accounting.noise_multiplier(
            target_epsilon=self.epsilon(self.steps),
            delta=self.delta,
            steps=self.steps,
            sampling=self.sampling,
            accountant=self.accountant,
        )
        return self.noise_multiplier / exact

    def sigma(self, step: int) -> float:
        """The noise multiplier of a step, the first of which is 0."""
        if isinstance(self.noise_multiplier, float):
            return self.noise_multiplier
        return self._until(step + 1)[-1][0]

    def _until(self, steps: int) -> list[tuple[float, int]]:
        """The schedule of the first `steps` steps."""
        if isinstance(self.noise_multiplier, float):
            return [(self.noise_multiplier, steps)]
        found = []
        for sigma, count in self.noise_multiplier:
            if steps > 0 < count:
                found.append((sigma, min(steps, count)))
                steps -= count
        return found


def make_plan(
    *,
    target_delta: float,
    expected_batch_size: int,
    sample_size: int | None,
    target_epsilon: float | None,
    noise_multiplier: float | Schedule | None,
    epochs: float | None,
    steps: int | None,
    cap: int | None,
    sampling: Sampling | None,
    accountant: str,
    norms: Mapping[str, Any],
) -> Plan:
    """Raises OptionError where arguments are missing, contradict each other, or cannot be met."""
    own = sampling is not None
    how = (
        _stated(sampling, cap, sample_size) if sampling is not None else _poisson(sample_size, expected_batch_size, cap)
    )
    if target_epsilon is None and noise_multiplier is None:
        raise OptionError("give target_epsilon, from which the noise is computed, or noise_multiplier")
    limit = _steps(epochs, steps, sample_size, expected_batch_size)
    sigma: float | Schedule
    shared: dict[str, Any] = {"delta": target_delta, "sampling": how, "accountant": accountant, **norms}
    if noise_multiplier is None:
        assert target_epsilon is not None
        if limit is None:
            raise OptionError("target_epsilon needs steps or epochs, over which the budget is spread")
        sigma = accounting.noise_multiplier(target_epsilon=target_epsilon, steps=limit, **shared)
    else:
        sigma, limit = _noise(noise_multiplier, limit)
        accounting.epsilon(noise_multiplier=1.0, steps=1, **shared)  # what is not allowed is said now
    plan = Plan(how, own, sigma, limit, target_delta, target_epsilon, accountant, norms)
    if noise_multiplier is None or target_epsilon is None:
        return plan
    number("target_epsilon", target_epsilon, positive=True)
    return Plan(how, own, sigma, _affordable(plan, target_epsilon), target_delta, target_epsilon, accountant, norms)


def _noise(noise_multiplier: float | Schedule, limit: int | None) -> tuple[float | Schedule, int | None]:
    """The noise, and the steps of its schedule if it has one."""
    if not isinstance(noise_multiplier, Sequence) or isinstance(noise_multiplier, str):
        return number("noise_multiplier", noise_multiplier, positive=False), limit
    schedule = accounting.schedule(noise_multiplier, None)
    total = sum(steps for _, steps in schedule)
    if limit not in (None, total):
        raise OptionError(
            f"noise_multiplier is a schedule of {total} steps, but {limit} are planned by steps or epochs"
        )
    return schedule, integer("steps of noise_multiplier", total, 1)


def _stated(sampling: Sampling, cap: int | None, sample_size: int | None) -> Sampling:
    if cap is not None:
        raise OptionError("cap is given beside sampling, which says how samples are drawn: leave one of them out")
    known = getattr(sampling, "sample_size", None)
    if known is not None and sample_size is not None and known != sample_size:
        raise OptionError(f"sample_size={sample_size!r}, but sampling says {known}: leave one of them out")
    return sampling


def _poisson(sample_size: int | None, expected_batch_size: int, cap: int | None) -> Sampling:
    if sample_size is None:
        raise OptionError(
            "sample_size is missing: the number of samples, of which a step takes each with the probability "
            "expected_batch_size / sample_size. Whoever draws otherwise says how by sampling="
        )
    size = integer("sample_size", sample_size, 1)
    if expected_batch_size > size:
        raise not_allowed("expected_batch_size", expected_batch_size, f"at most sample_size, {size}")
    rate = expected_batch_size / size
    return Poisson(rate, size) if cap is None else TruncatedPoisson(rate, integer("cap", cap, 1), size)


def _steps(epochs: float | None, steps: int | None, sample_size: int | None, expected_batch_size: int) -> int | None:
    if epochs is not None and steps is not None:
        raise OptionError("epochs and steps are both given: leave one of them out")
    if epochs is None:
        return integer("steps", steps, 1, optional=True)
    if sample_size is None:
        raise OptionError("epochs needs sample_size: the number of samples in one of them")
    return math.ceil(number("epochs", epochs, positive=True) * sample_size / expected_batch_size)


def _affordable(plan: Plan, target: float) -> int:
    """The most steps that stay within the target, or all that are planned."""
    if plan.steps is not None and plan.epsilon(plan.steps) <= target:
        return plan.steps
    low, high = 0, plan.steps or 1
    while plan.steps is None and plan.epsilon(high) <= target:
        low, high = high, 2 * high
        if high > 2**40:
            raise OptionError(
                f"noise_multiplier={plan.noise_multiplier!r} never reaches target_epsilon={target!r}: leave one of "
                "them out, or give steps"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan.epsilon(middle) <= target else (low, middle)
    if low == 0:
        raise OptionError(
            f"target_epsilon={target!r} is less than what one step spends with noise_multiplier="
            f"{plan.noise_multiplier!r}: allow more, or add more noise"
        )
    return low
