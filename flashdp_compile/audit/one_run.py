"""The game of an audit: canaries take part by coin flips, and are guessed from one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.audit.bound import epsilon_lower_bound
from flashdp_compile.checks import integer
from flashdp_compile.errors import OptionError

Train = Callable[[Tensor], Tensor]
"""(which canaries take part, bool [m]) -> scores [m]: trains with them, and tells from what was released how likely it
is that each took part. It must use its argument for nothing but training."""


@dataclass(frozen=True)
class OneRun:
    """`epsilon` is a lower bound: the run is not (epsilon', delta)-DP for any epsilon' below it, unless what was seen
    is one of the 1 - confidence rarest cases."""

    epsilon: float
    correct: int
    guesses: int
    canaries: int
    delta: float
    confidence: float

    def __str__(self) -> str:
        return (
            f"epsilon >= {self.epsilon:.3f} at delta {self.delta:g}, confidence {self.confidence:g}: "
            f"{self.correct} of {self.guesses} guesses right, {self.canaries} canaries"
        )


def one_run(
    train: Train,
    canaries: int,
    *,
    delta: float,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int | None = None,
) -> OneRun:
    """Includes each of `canaries` with probability 1/2, trains once, and guesses: those with the highest scores were
    in, those with the lowest out, `guesses` in all (None: each canary).

    `guesses` must be chosen before the run: the best of several is no bound. Few are right for a large epsilon, where
    the tails tell; all for a mechanism that reveals the same about every canary. `seed` draws the inclusion; None takes
    it from the operating system.

    Raises:
        OptionError: a value is not allowed, or the scores are not one finite number for each canary.
    """
    count = integer("canaries", canaries, 1)
    made = count if guesses is None else integer("guesses", guesses, 1)
    epsilon_lower_bound(0, made, delta, confidence, count)  # what is not allowed is said before the run
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(integer("seed", seed, 0))
    included = torch.rand(count, generator=generator) < 0.5
    scores = train(included.clone()).detach().to("cpu", torch.float64)
    if scores.shape != (count,) or not scores.isfinite().all():
        raise OptionError(
            f"train gave scores of shape {tuple(scores.shape)}, {int((~scores.isfinite()).sum())} of them not finite; "
            f"allowed: one finite number for each of {count} canaries"
        )
    correct = _right(scores, included, made)
    epsilon = epsilon_lower_bound(correct, made, delta, confidence, count)
    return OneRun(epsilon, correct, made, count, delta, confidence)


def _right(scores: Tensor, included: Tensor, guesses: int) -> int:
    """How many guesses are right. Ties go by the canaries' order, which tells nothing about the coins."""
    order = scores.argsort(stable=True)
    out, in_ = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int((~included[out]).sum() + included[in_].sum())
