"""What a rewritten graph must release, in numbers: the one thing that `verify` is told about privacy.

It is derived from the options, the names of the parameters and the plan's slack (which verify checks against the norms
it finds), never from what the rewrite did, so that the rewrite cannot be wrong about both sides of the comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashdp_compile.passes.axes.domain import Size
from flashdp_compile.passes.groups import Group
from flashdp_compile.passes.mechanism import Mechanism


@dataclass(frozen=True)
class Guarantee:
    """For every group k with bound C_k, over all parameters together (docs/privacy.md):

        released_k = ( sum_b clip_fn(g_bk, C_k) + N(0, deviation^2) ) / divisor

    `mechanism.mean`: what backward was called on is a mean over the samples, so g_bk is B times what arrives from
    sample b. `mechanism.grad_scaler`: its scale s multiplies that, too; what leaves the graph is s released_k.
    `mechanism.bounds`: g_bk is divided by the present scale of its group first, and the norms within bounds are
    counted.
    `norm`: "exact", or clip_fn sees estimates of the norms of some g_bk, from at least `probes` Gaussian probes that
    every release draws anew (or a logical batch, which keeps them), no two of its gradients sharing any.
    `slack`: how far rounding may carry a clipped norm beyond its bound, relative to it; the noise is raised by as much.
    """

    groups: tuple[Group, ...]
    mechanism: Mechanism
    slack: float
    norm: str = "exact"
    probes: int = 0

    @property
    def deviation(self) -> float:
        """sigma sqrt(sum_k C_k^2) (1 + slack), of the noise on the undivided sum."""
        total = math.fsum(group.bound * group.bound for group in self.groups)
        return self.mechanism.noise_multiplier * math.sqrt(total) * (1 + self.slack)

    def divisor(self, batch: Size) -> int | None:
        """1, the expected size of a batch, or the size of the batch at hand; None if only the run will tell it."""
        if not self.mechanism.mean:
            return 1
        if self.mechanism.expected_batch_size is not None:
            return self.mechanism.expected_batch_size
        return max(batch, 1) if isinstance(batch, int) else None
