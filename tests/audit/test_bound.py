"""The bound: against exact sums and a linear program, and never above what mechanisms of known epsilon reveal."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom

from flashdp_compile import OptionError
from flashdp_compile.audit import epsilon_lower_bound, p_value


def exactly(right: Fraction, guesses: int) -> list[Fraction]:
    """P[Binomial = k] for all k."""
    return [math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(guesses + 1)]


@pytest.mark.parametrize("correct, guesses, canaries, delta", [(9, 10, 10, 1e-3), (17, 20, 50, 1e-4), (13, 20, 20, 0)])
@pytest.mark.parametrize("right", [Fraction(1, 2), Fraction(2, 3)])
def test_the_p_value_is_that_of_the_worst_excess(correct, guesses, canaries, delta, right):
    """The distribution of F by a linear program over P[F = i]: E[F] <= 2 m delta, and it is a distribution."""
    chances = exactly(right, guesses)
    just_below = [float(sum(chances[correct - i : correct])) for i in range(correct + 1)]
    worst = linprog(
        [-p for p in just_below],
        A_ub=[list(range(correct + 1))],
        b_ub=[2 * canaries * delta],
        A_eq=[[1.0] * (correct + 1)],
        b_eq=[1.0],
    )
    epsilon = math.log(float(right / (1 - right)))
    expected = float(sum(chances[correct:])) - worst.fun
    assert p_value(epsilon, correct, guesses, delta, canaries) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("guesses", [10, 100, 1000])
def test_all_right_without_delta(guesses):
    q = 0.05 ** (1 / guesses)
    assert epsilon_lower_bound(guesses, guesses, 0.0) == pytest.approx(math.log(q / (1 - q)), rel=1e-6)


@pytest.mark.parametrize("correct, guesses", [(15, 20), (17, 20), (45, 60)])
def test_some_right_by_a_search_through_exact_sums(correct, guesses):
    odds = [Fraction(100 + k, 100) for k in range(900)]  # e^epsilon
    refuted = [o for o in odds if sum(exactly(o / (1 + o), guesses)[correct:]) <= Fraction(1, 20)]
    assert max(refuted) <= math.exp(epsilon_lower_bound(correct, guesses, 0.0)) < max(refuted) + Fraction(1, 100)


def test_it_rises_with_what_is_right_and_falls_with_what_is_allowed():
    bounds = [epsilon_lower_bound(v, 200, 1e-5) for v in range(201)]
    assert bounds == sorted(bounds) and bounds[100] == 0 and bounds[200] > 4 and bounds[110] == 0
    assert epsilon_lower_bound(160, 200, 1e-5, confidence=0.99) < bounds[160]
    assert epsilon_lower_bound(160, 200, 1e-4) < bounds[160]
    assert epsilon_lower_bound(160, 200, 1e-5, canaries=5000) < bounds[160]
    assert epsilon_lower_bound(200, 200, 0.5) == 0
    assert epsilon_lower_bound(0, 0, 1e-5) == 0


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [20, 100])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_randomized_response_is_covered(epsilon, guesses, delta):
    """v of (epsilon, delta)-DP randomized response is Binomial(r, (1 - delta) q + delta): over all v, exactly."""
    chances = binom.pmf(np.arange(guesses + 1), guesses, (1 - delta) / (1 + math.exp(-epsilon)) + delta)
    above = [epsilon_lower_bound(v, guesses, delta) > epsilon for v in range(guesses + 1)]
    assert chances[above].sum() <= 0.05
    if delta == 0:  # and not by being timid: one guess more or less is all that is lost
        assert chances[np.argmax(above) - 1 :].sum() > 0.05


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_many_guesses_come_close(epsilon):
    right = 1 / (1 + math.exp(-epsilon))
    likely = range(int(binom.ppf(1e-4, 5000, right)), int(binom.ppf(1 - 1e-4, 5000, right)), 8)
    chances = binom.pmf(list(likely), 5000, right)
    mean = np.average([epsilon_lower_bound(v, 5000, 0.0) for v in likely], weights=chances)
    assert 0.8 * epsilon < mean < epsilon


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((3, 2, 0.0), "correct=3 .* at most guesses, 2"),
        ((-1, 2, 0.0), "correct=-1"),
        ((1, 2, 1.0), "delta=1.0"),
        ((1, 2, 0.0, 1.0), "confidence=1.0"),
        ((1, 2, 0.0, 0.95, 1), "guesses=2 .* each of 1 canaries"),
    ],
)
def test_what_is_not_allowed(arguments, text):
    with pytest.raises(OptionError, match=text):
        epsilon_lower_bound(*arguments)
