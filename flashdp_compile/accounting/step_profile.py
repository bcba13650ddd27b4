"""The privacy loss of one step whose clipping is off by a random factor that is revealed, for dp-accounting to compose.

Given u (`ratio_law`) a sample moves the sum by at most C / sqrt(u). With y = sigma^2 u and the sampling rate q, the
outputs without it and with it are N(0, 1) and (1 - q) N(0, 1) + q N(1 / sqrt(y), 1), along the line that joins them.
Their hockey-stick divergences at e^eps, eps >= 0, are prices of options as Black and Scholes have them:

    call(t, y) = E max(e^L - e^t, 0) = Phi(d) - e^t Phi(d - 1 / sqrt(y)),   d = 1 / (2 sqrt(y)) - t sqrt(y)

    with the sample from without:   q call(t, y),                      t = log(1 + (e^eps - 1) / q)
    without the sample from with:   (1 - (1 - q) e^eps) call(t, y),    t = -log(1 - (1 - e^-eps) / q)

where L ~ N(-1 / 2y, 1 / y). The second is 0 where its factor is not positive; it is q e^eps put(-t), and put(-t) is
e^-t call(t). At -eps each is 1 - e^-eps + e^-eps times the other one at eps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtr

from flashdp_compile.accounting.ratio_law import Array, Law

CONVEX_FROM = 1 / 12  # where call(t, y) begins to be convex in y, for the t that is the last to be
LARGEST = 60.0  # loss of a step; a larger one counts as infinite
NEGLIGIBLE = 1e-15  # divergence at which the losses of a step end
COARSE, FINE = 0.005, 0.02  # between losses: relative to a loss, and to the deviation of the losses of a step
COARSEST, MOST = 2.0**-10, 2.0**18  # of the grid on which losses are added: its interval, its points


def call(t: Array, y: Array, convex: bool) -> Array:
    """The price for every t >= 0 (rows) and y (columns); if `convex`, a convex function of y that is no less.

    The price falls in y, with the slope -phi(d) / (2 y^(3/2)). It is convex from y0(t) = 1 / (6 + 2 sqrt(9 + t^2)) on,
    which is 1/12 at most, and concave before: there the tangent at y0 lies above the price, and takes its place.
    """
    t, y = t[:, None], y[None, :]
    with np.errstate(divide="ignore"):
        volatility = 1 / np.sqrt(y)
    if not convex:
        return _black_scholes(t, volatility)
    most = np.sqrt(6 + 2 * np.sqrt(9 + t * t))  # 1 / sqrt(y0)
    density = np.exp(-((most / 2 - t / most) ** 2) / 2) / math.sqrt(2 * math.pi)
    tangent = density * most / 2 * np.maximum(1 - y * most * most, 0)
    return _black_scholes(t, np.minimum(volatility, most)) + tangent


def _black_scholes(t: Array, volatility: Array) -> Array:
    in_the_money, half = t / volatility, volatility / 2
    return np.maximum(ndtr(half - in_the_money) - np.exp(t + log_ndtr(-half - in_the_money)), 0)


def divergences(losses: Array, sigma: float, rate: float, law: Law, convex: bool) -> tuple[Array, Array]:
    """(with the sample from without, without it from with) at e^eps for all `losses` eps, ascending from 0.

    Under `convex` they are more than those of any spectrum, though not by themselves of one pair of distributions.
    The supremum over all spectra is convex in e^eps and falls, so their convex minorant is no less than it.
    """
    gained = np.expm1(losses)
    left = np.exp(-losses) - (1 - rate) if rate > 0.5 else np.expm1(-losses) + rate  # the same, without cancellation
    possible = left > 0
    factors = np.full_like(losses, rate), np.where(possible, np.exp(losses) * left, 0.0)
    at = np.log1p(gained / rate), np.log(rate / np.where(possible, left, rate))
    found = []
    for factor, t in zip(factors, at, strict=True):
        mean = _falling(factor * np.minimum(call(t, sigma**2 * law.values, convex) @ law.masses, 1.0))
        found.append(_falling(_convex_minorant(gained, mean)) if convex else mean)
    return found[0], found[1]


def _falling(values: Array) -> Array:
    return np.minimum.accumulate(np.clip(values, 0.0, 1.0))


def _convex_minorant(x: Array, y: Array) -> Array:
    """The largest convex function below the points, at x: the lower side of their hull (Andrew 1979)."""
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return np.interp(x, x[kept], y[kept])


def interval(sigma: float, rate: float, law: Law, convex: bool) -> float:
    """A spacing of losses, a power of two, that is fine for those of a step and needs no more than MOST points."""
    deviation = rate * math.sqrt(math.expm1(1 / sigma**2))  # of the losses of an exact step, to first order
    losses = COARSEST * _points(COARSEST, 10 * COARSE)
    largest = max(losses[_end(side)] for side in divergences(losses, sigma, rate, law, convex))
    return float(min(COARSEST, 2.0 ** math.floor(math.log2(max(FINE * deviation, largest / MOST)))))


def loss_distribution(sigma: float, rate: float, law: Law, convex: bool, spacing: float) -> Any:
    """Of one step: the profile of the distribution is at least that of the step, at every eps, in either direction.

    It has the divergences at some multiples of `spacing` and is linear in e^eps between them, as a convex function is
    at most (Doroshenko et al. 2022, "Connect the dots").
    """
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    points = _points(spacing, COARSE)
    one, other = divergences(points * spacing, sigma, rate, law, convex)
    return PrivacyLossDistribution(_connected(points, one, other, spacing), _connected(points, other, one, spacing))


def _connected(points: Array, above: Array, below: Array, spacing: float) -> Any:
    """From the divergences at e^eps for eps >= 0, and those of the other direction, which give the ones at -eps."""
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots

    high, low = _end(above), _end(below)
    shrunk = np.exp(-points[low:0:-1] * spacing)
    return create_pmf_pessimistic_connect_dots(
        spacing,
        np.append(-points[low:0:-1], points[: high + 1]),
        _falling(np.append(1 - shrunk * (1 - below[low:0:-1]), above[: high + 1])),
    )


def _points(spacing: float, coarse: float) -> Array:
    """Whole numbers n from 0 to LARGEST / spacing: all of them at first, then each larger by `coarse` than the last."""
    found = [0]
    while found[-1] * spacing < LARGEST:
        found.append(found[-1] + max(1, int(coarse * found[-1])))
    return np.array(found, float)


def _end(divergence: Array) -> int:
    """Index of the first that is negligible, or of the last."""
    return min(int(np.sum(divergence > NEGLIGIBLE)), len(divergence) - 1)
