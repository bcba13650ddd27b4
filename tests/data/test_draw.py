"""The draw is Poisson sampling: every claim of its distribution, on numbers with a fixed seed."""

import numpy as np
import pytest
from scipy import stats

from flashdp_compile.data import PoissonSampler
from flashdp_compile.data.draw import generator, logical_batch, taking_part

SIZE, RATE, STEPS = 40, 0.15, 6000


@pytest.fixture(scope="module")
def took_part():
    """[STEPS, SIZE], 1 where a sample takes part in a step."""
    table = np.zeros((STEPS, SIZE))
    for step, batch in enumerate(PoissonSampler(SIZE, RATE, steps=STEPS, seed=1)):
        assert len(set(batch)) == len(batch)
        table[step, batch] = 1
    return table


def test_every_sample_takes_part_at_the_rate(took_part):
    values = [stats.binomtest(int(count), STEPS, RATE).pvalue for count in took_part.sum(0)]
    assert min(values) * SIZE > 0.01
    assert stats.binomtest(int(took_part.sum()), STEPS * SIZE, RATE).pvalue > 0.01


def test_batch_sizes_are_binomial(took_part):
    sizes = took_part.sum(1)
    deviation = (SIZE * RATE * (1 - RATE)) ** 0.5
    assert abs(sizes.mean() - SIZE * RATE) < 3 * deviation / STEPS**0.5
    assert abs(sizes.var() / deviation**2 - 1) < 3 * (2 / STEPS) ** 0.5
    edges = np.arange(1, 13)  # classes 0-1, 2, ..., 11, 12 and more
    expected = STEPS * np.diff([0, *stats.binom.cdf(edges, SIZE, RATE), 1])
    found = np.bincount(np.searchsorted(edges, sizes), minlength=13)
    assert stats.chisquare(found, expected).pvalue > 0.01


@pytest.mark.parametrize("lag", [0, 1])
def test_samples_are_independent_of_each_other_and_from_step_to_step(took_part, lag):
    centred = took_part - RATE
    together = centred[: STEPS - lag].T @ centred[lag:] / (RATE * (1 - RATE) * (STEPS - lag) ** 0.5)
    scores = together[np.triu_indices(SIZE, 1)] if lag == 0 else together.ravel()  # nearly normal, and uncorrelated
    assert 2 * stats.norm.sf(abs(scores).max()) * len(scores) > 0.01
    assert abs((scores**2).mean() - 1) < 3 * (2 / len(scores)) ** 0.5


class _Given:
    """Random numbers that are given."""

    def __init__(self, digits, rest):
        self.digits, self.rest = np.array(digits, np.uint16), np.array(rest)

    def integers(self, high, size, dtype):
        assert (high, size, dtype) == (2**16, len(self.digits), np.uint16)
        return self.digits

    def random(self, size):
        assert size == len(self.rest)
        return self.rest


def test_the_digits_behind_the_first_sixteen_decide_ties():
    numbers = _Given([4, 5, 5, 5, 6, 65535, 0], [0.2499, 0.25, 0.2501])
    assert taking_part(7, 5.25 / 2**16, numbers).tolist() == [0, 1, 6]


def test_rates_below_the_first_sixteen_digits():
    count = sum(len(taking_part(2**21, 1.5 * 2**-17, generator(3, step))) for step in range(20))
    assert stats.binomtest(count, 20 * 2**21, 1.5 * 2**-17).pvalue > 0.01


@pytest.mark.parametrize("rate, expected", [(1, 500), (1.0, 500), (1e-15, 0)])
def test_extreme_rates(rate, expected):
    assert len(taking_part(500, rate, generator(0, 0))) == expected


def test_order_and_cap_prefer_nobody():
    """Of those who were drawn, by their rank, who comes first and who is among the `cap` kept."""
    drawn, cap, first, kept = 5, 2, np.zeros(5), np.zeros(5)
    for step in range(8000):
        whole = logical_batch(12, 0.4, None, generator(5, step))
        short = logical_batch(12, 0.4, cap, generator(5, step))
        assert len(short) == min(len(whole), cap) and set(short) <= set(whole)
        if len(whole) == drawn:
            ranks = np.searchsorted(sorted(whole), short)
            first[ranks[0]] += 1
            kept[ranks] += 1
    assert first.sum() > 1500
    assert stats.chisquare(first).pvalue > 0.01
    assert stats.chisquare(kept).pvalue > 0.01


def test_the_cap_holds_and_everyone_is_as_likely():
    counts, sizes = np.zeros(30), []
    for batch in PoissonSampler(30, 0.4, steps=4000, cap=10, seed=6):
        counts[batch] += 1
        sizes.append(len(batch))
    assert max(sizes) == 10 and min(sizes) < 10
    expected = np.minimum(np.arange(31), 10) @ stats.binom.pmf(np.arange(31), 30, 0.4) / 30
    values = [stats.binomtest(int(count), 4000, expected).pvalue for count in counts]
    assert min(values) * 30 > 0.01


def test_ten_million_samples_are_no_burden():
    """15 ms where this was written; a bound that only a list or a loop over samples exceeds."""
    from time import process_time

    start = process_time()
    assert 9000 < len(logical_batch(10_000_000, 1e-3, None, generator(0, 0))) < 11000
    assert process_time() - start < 0.5
