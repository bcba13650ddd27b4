"""One draw of Poisson sampling, and the random numbers that belong to a step."""

from __future__ import annotations

import numpy as np

_DOMAIN = 0x64617461  # "data": the same seed elsewhere in a program starts another stream
_DIGITS = 16  # binary digits of a uniform number that are drawn for every sample


def generator(seed: int | None, step: int, shared: tuple[int, ...] = ()) -> np.random.Generator:
    """The random numbers of a step: a function of (seed, step) alone, so that a run can go on at any step; or without a
    seed 128 bits of the operating system. Processes that draw together have `shared` numbers instead of these."""
    if seed is not None:
        drawn = np.random.SeedSequence((_DOMAIN, seed), spawn_key=(step,))
    else:
        drawn = np.random.SeedSequence((_DOMAIN, *shared), spawn_key=(step,)) if shared else np.random.SeedSequence()
    return np.random.Generator(np.random.PCG64DXSM(drawn))


def taking_part(sample_size: int, rate: float, numbers: np.random.Generator) -> np.ndarray:
    """Each of 0 ... sample_size - 1 with probability `rate`, independently of all others: int64, ascending.

    A sample takes part where its uniform number in [0, 1) is less than the rate. The first 16 binary digits decide
    for all but one sample in 65536, and 53 more for that one, so the probability is the rate up to 2^-69.

    Drawing a binomial count and then a set of that size would be as exact on paper, and quicker for small rates. But
    numpy cuts the binomial distribution off at ten standard deviations, and a guarantee should not rest on its tail.
    """
    whole, rest = divmod(rate * 2**_DIGITS, 1)  # no rounding: a power of two only moves the binary point
    digits = numbers.integers(2**_DIGITS, size=sample_size, dtype=np.uint16)
    taken = digits < int(whole)
    ties = np.flatnonzero(digits == int(whole))
    taken[ties] = numbers.random(len(ties)) < rest
    return np.flatnonzero(taken)


def logical_batch(sample_size: int, rate: float, cap: int | None, numbers: np.random.Generator) -> list[int]:
    """The samples of a step in random order, of which the first `cap` are as likely as any other `cap` of them."""
    return numbers.permutation(taking_part(sample_size, rate, numbers))[:cap].tolist()
