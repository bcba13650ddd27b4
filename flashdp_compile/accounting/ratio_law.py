"""The law of u, the estimate of a squared norm over its true value, in the worst case, as finitely many values.

A sketch of k Gaussian probes gives  u = sum_i lambda_i chi2_k(i) / k  where the lambda_i >= 0, which depend on the
gradient, sum to 1. One sample moves a sum by at most C / sqrt(u), so a step costs E phi(u) for functions phi that
decrease (`step_profile`). Two laws bound that for all lambda at once, with G = chi2_k / k:

    "convex"    u = G          for phi that are convex, by Jensen's inequality
    "envelope"  u = min(1, G)  for all phi, as P(u <= x) <= P(G <= x) for x <= 1

With clipping groups of bounds C_l and sketches of their own, a sample moves the sums by at most C sqrt(V), where
V = sum_l w_l / u_l and w_l = C_l^2 / C^2, C^2 = sum_l C_l^2. So u = 1 / V, in which phi is convex in all u_l together.

docs/randomized_clipping.md has the proofs. Values are rounded so that the bound stays one: E phi does not fall where a
value is replaced by a smaller one, nor, where phi is convex, by two values around it with the same mean (Edmundson
1956, Madansky 1959).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import gammainc, gammaincc, gammainccinv, gammaincinv, ndtr

Array = NDArray[np.float64]
Groups = tuple[tuple[float, int], ...]
"""(share w of the squared bound, how many groups have it)."""

BOUNDS = ("convex", "envelope")
FLAT: Groups = ((1.0, 1),)
CELLS = {"convex": 400, "envelope": 1600}  # of u; half of those of an envelope are above 1
FAR = 8.2  # deviations; what lies beyond has a mass of 1.2e-16
BEYOND = 1e-13  # the chance of a 1 / u that counts as infinite, where there are several groups
CELLS_OF_A_GROUP, MOST_CELLS = 512, 2**20  # of V, for each w and in all


class Law(NamedTuple):
    """`values` in ascending order, and their masses."""

    values: Array
    masses: Array


EXACT = Law(np.ones(1), np.ones(1))


@lru_cache(maxsize=64)
def worst_law(probes: int, groups: Groups, bound: str, convex_from: float = 0.0) -> Law:
    """The u with the largest E phi(u), or with more, for every phi that decreases and is convex from `convex_from` on.

    "convex" needs convex_from=0.
    """
    cells = CELLS[bound]
    if groups == FLAT:
        grid = _quantiles(probes, cells)
        if bound == "envelope":
            grid = np.append(grid[grid < 1], 1.0)
        return Law(grid, _chi2_on(grid, probes, convex_from))
    law = _law_of_groups(probes, groups, bound)
    return _merged(law, _quantiles_of(law, cells), convex_from)


def _quantiles(probes: int, cells: int) -> Array:
    """0, and the values of chi2_k / k at evenly spaced normal scores."""
    score = np.linspace(-FAR, FAR, cells + 1)
    half = probes / 2
    found = np.where(score < 0, gammaincinv(half, ndtr(score)), gammainccinv(half, ndtr(-score))) / half
    return np.unique(np.append(0.0, found))


def _chi2_on(grid: Array, probes: int, convex_from: float) -> Array:
    """The mass of chi2_k / k on a grid from 0 on; what lies beyond the last point goes there."""
    half = probes / 2
    mass, tail = _gamma(half, half * grid)
    moment, _ = _gamma(half + 1, half * grid)  # x times the density of chi2_k / k is the density of chi2_(k+2) / k
    low, high = grid[:-1], grid[1:]
    raised = np.clip((moment - low * mass) / (high - low), 0, mass) * (low >= convex_from)
    found = np.append(mass - raised, tail)
    found[1:] += raised
    return found


def _gamma(shape: float, points: Array) -> tuple[Array, float]:
    """The mass of a Gamma variable between neighbouring points, and beyond the last: by the smaller of both tails."""
    below, above = gammainc(shape, points), gammaincc(shape, points)
    return np.where(points[:-1] > shape, -np.diff(above), np.diff(below)), float(above[-1])


@lru_cache(maxsize=8)
def _law_of_groups(probes: int, groups: Groups, bound: str) -> Law:
    """The law of 1 / V, from that of V: a convolution, on the multiples of top / cells.

    A 1 / u above `top` counts as infinite, so a finite V is at most top, times the sum of all w, which is 1.
    """
    count = sum(n for _, n in groups)
    top = probes / 2 / float(gammaincinv(probes / 2, BEYOND / count))
    cells = min(MOST_CELLS, CELLS_OF_A_GROUP * math.ceil(top / min(w for w, _ in groups)))
    size = next_fast_len(cells + count + 1, real=True)  # a group may reach one point further than w * cells
    spectrum: Any = 1.0
    all_finite = 0.0  # the logarithm of the chance; what is left of the sum has the rounding of the transforms in it
    for w, n in groups:
        points = np.arange(math.ceil(w * cells), 0, -1)  # of w / u, in units of top / cells
        grid = np.append(0.0, w * cells / top / points)  # of u
        within = grid <= (1.0 if bound == "envelope" else math.inf)
        masses = np.zeros(len(grid))
        masses[within] = _chi2_on(grid[within], probes, 0.0 if bound == "convex" else math.inf)
        spectrum = spectrum * rfft(np.append(0.0, masses[:0:-1]), size) ** n
        all_finite += n * math.log1p(-masses[0])
    infinite = -math.expm1(all_finite)
    finite = np.maximum(irfft(spectrum, size), 0)[:0:-1]
    values = cells / top / np.arange(size - 1, 0, -1)
    return Law(np.append(0.0, values), np.append(max(1 - finite.sum(), infinite), finite))


def _quantiles_of(law: Law, cells: int) -> Array:
    """Values of the law at evenly spaced normal scores, from the first to the last."""
    score = np.linspace(-FAR, FAR, cells + 1)
    below, above = np.cumsum(law.masses), np.cumsum(law.masses[::-1])
    low = np.searchsorted(below, ndtr(score[score < 0]))
    high = len(above) - 1 - np.searchsorted(above, ndtr(-score[score >= 0]))
    at = np.unique(np.clip(np.concatenate([[0], low, high, [len(above) - 1]]), 0, len(above) - 1))
    return law.values[at]


def _merged(law: Law, grid: Array, convex_from: float) -> Law:
    """A law on the fewer points of `grid`, which has the first and the last of the values."""
    cell = np.clip(np.searchsorted(grid, law.values, side="right") - 1, 0, len(grid) - 2)
    low, high = grid[cell], grid[cell + 1]
    raised = law.masses * (law.values - low) / (high - low)
    raised[(low < convex_from) & (law.values < high)] = 0
    found = np.zeros(len(grid))
    np.add.at(found, cell, law.masses - raised)
    np.add.at(found, cell + 1, raised)
    return Law(grid, found)
