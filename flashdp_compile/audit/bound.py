"""From right guesses to a lower bound on epsilon: Steinke, Nasr, Jagielski 2023, "Privacy auditing with one (1)
training run", arXiv 2305.08846, Theorem 5.2 (Proposition 5.1 for delta = 0).

Each of m canaries takes part with probability 1/2, independently. From the output of the run an auditor guesses r of
these m bits, of its choice, and v guesses are right. If the run is (epsilon, delta)-DP, then given the output and the
bits before it a guess is right with probability q = e^epsilon / (1 + e^epsilon) at most, but for an excess that delta
pays for. So v is dominated by W + F, where W is Binomial(r, q), F >= 0 and E[F] <= 2 m delta, and

    P[v guesses or more] <= P[W >= v] + sum_i P[v > W >= v - i] P[F = i]
                         <= P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i

as the sum is linear in the P[F = i], of which only sum_i i P[F = i] is known: the worst F has one value beside 0.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom

from flashdp_compile.checks import integer, not_allowed

_HIGHEST = 700.0  # beyond it e^epsilon is no float
_HALVINGS = 32


def p_value(epsilon: float, correct: int, guesses: int, delta: float, canaries: int | None = None) -> float:
    """The most that the probability of `correct` right guesses or more can be, if the run is (epsilon, delta)-DP."""
    total = _check(correct, guesses, delta, canaries)
    if correct == 0:
        return 1.0
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    just_below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))  # P[v > W >= v - i], i from 1
    steepest = float(np.max(just_below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * total * delta * steepest)


def epsilon_lower_bound(
    correct: int, guesses: int, delta: float, confidence: float = 0.95, canaries: int | None = None
) -> float:
    """The largest epsilon that is refuted: runs that are (epsilon, delta)-DP give so many right guesses with
    probability 1 - confidence at most.

    `canaries` counts those that were left without a guess, too; None means that there are none.

    Edge cases: 0 where chance explains the guesses; finite even if all are right, log(q / (1 - q)) with q^guesses =
    1 - confidence for delta = 0; 0 where delta is so large that the excess alone explains them.
    """
    _check(correct, guesses, delta, canaries)
    if not 0 < confidence < 1:
        raise not_allowed("confidence", confidence, "a number between 0 and 1")

    def refuted(epsilon: float) -> bool:
        return p_value(epsilon, correct, guesses, delta, canaries) <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _HIGHEST and refuted(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):  # refuted(low) throughout, so low is a bound even if the p-value were not monotone
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check(correct: int, guesses: int, delta: float, canaries: int | None) -> int:
    """The number of canaries."""
    integer("guesses", guesses, 0)
    total = guesses if canaries is None else integer("canaries", canaries, 0)
    if guesses > total:
        raise not_allowed("guesses", guesses, f"at most one for each of {total} canaries")
    if integer("correct", correct, 0) > guesses:
        raise not_allowed("correct", correct, f"at most guesses, {guesses}")
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 <= delta < 1:
        raise not_allowed("delta", delta, "a number in [0, 1)")
    return total
