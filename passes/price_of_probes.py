"""What estimated norms would take with few and with many probes, beside the fastest exact ones: for `explain`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from flashdp_compile.kernels.probes import LEAST, MOST
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import device_of
from flashdp_compile.passes.plan import evaluate, size_hints
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Strategy
from flashdp_compile.passes.strategies.catalogue import candidates, estimates

COUNTS = tuple(1 << n for n in range(LEAST.bit_length() - 1, MOST.bit_length()))


class Price(NamedTuple):
    """Of the layers that are estimated with so many probes: how many there are, operations and predicted seconds of
    norms and sums together, and those of the fastest exact strategy of each. `noise`: by how much noise grows at the
    least, which is where there is much of it; the accountant knows the rest."""

    probes: int
    layers: int
    flops: float
    exact_flops: float
    seconds: float
    exact_seconds: float
    noise: float


def prices(gradients: Sequence[ParameterGradient], axes: Axes, norm: str) -> list[Price]:
    """One for each number of probes, as if every layer that `norm` would estimate with so many were."""
    hints, found = size_hints(axes), []

    def costs(gradient: ParameterGradient, strategies: Sequence[Strategy]) -> tuple[float, float]:
        """Seconds and operations of the fastest."""
        device = device_of(gradient)
        every = [s.cost(gradient, axes) for s in strategies]
        return min((evaluate(device.seconds(c.kernels), hints), evaluate(c.flops, hints)) for c in every)

    for probes in COUNTS:
        pairs = [(g, own) for g in gradients if (own := estimates(norm, probes, g, axes))]
        estimated = [costs(g, own) for g, own in pairs]
        exact = [costs(g, candidates(g, axes)) for g, _ in pairs]
        (seconds, flops), (exact_seconds, exact_flops) = map(_total, (estimated, exact))
        noise = math.sqrt(probes / (probes - 2))
        found.append(Price(probes, len(pairs), flops, exact_flops, seconds, exact_seconds, noise))
    return found


def _total(costs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(s for s, _ in costs), sum(f for _, f in costs)
