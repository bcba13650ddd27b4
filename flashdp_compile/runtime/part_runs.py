"""What compiled parts of one model know of each other while they run backward (parts.py): the norms of all of them,
where one bound is to hold for all together.

Such a bound needs the norm of a sample over all parts before the first of them may send its clipped sum away. So the
backward runs twice: once for norms alone, and once more for the sums, in which part k clips sample b to its share
s_bk C of the bound. With the norms n_bk of the first run, s_bk = n_bk / sqrt(sum_j n_bj^2) makes of it the clipping of
the whole gradient to C. And since sum_k s_bk^2 = 1, and the second run takes norms of its own, all that one sample adds
is at most C long, whatever the first run has found.

Compiled code knows this by its place in a list of this process, as it knows scalers (scaling.py): parts of one class
share it, so that which of them runs is told (`running`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.errors import InternalError, Refusal
from flashdp_compile.kernels.clip import floored

__all__ = ["PartRuns", "share_bound"]

ROUNDING = 2.0**-22  # of norms over shares, upwards

_known: list[PartRuns] = []


class PartRuns:
    """Of one model. `shared`: its parts have one bound, in the shares said above. `kept`: bytes that stay on the device
    of a part whatever part runs, of parameters and their sums. `running` is the number of the part whose backward
    runs."""

    def __init__(self, *, shared: bool = False, kept: int = 0) -> None:
        self.place, self.shared, self.kept = len(_known), shared, kept
        self.running: int | None = None
        _known.append(self)
        self._norms: dict[int, Tensor] | None = None
        self._shares: Mapping[int, Tensor] = {}

    def told(self) -> Any:
        """All that can change a graph, as JSON takes it."""
        return [self.place] if self.shared else []

    def begin(self, part: int | None) -> None:
        """The backward of this part begins."""
        self.running = part

    @property
    def measuring(self) -> bool:
        """Whether only norms are wanted of the backward that runs."""
        return self._norms is not None

    def twice(self, backward: Callable[[bool], None], between: Callable[[], None]) -> None:
        """Runs it for norms, and again for sums; it is told whether it will run again."""
        self._norms = norms = dict[int, Tensor]()
        try:
            backward(True)
        finally:
            self._norms = None
        between()
        self._shares = _shares(norms)
        try:
            backward(False)
        finally:
            self._shares = {}

    def norm_by_share(self, sqnorm: Tensor) -> Tensor:
        sqnorm = floored(sqnorm)
        if self._norms is not None and self.running is not None:
            self._norms[self.running] = sqnorm
            return torch.ones_like(sqnorm)  # of no use: the sums are thrown away
        if self.running is None or self.running not in self._shares:
            raise InternalError("a part of a model runs backward, and its share of the clipping bound is not known")
        return (sqnorm / self._shares[self.running]).to(sqnorm.dtype)


def _shares(norms: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """s_bk^2 [B] in float64 for each part k; 0 for a sample one of whose norms is not finite."""
    if len({norm.shape for norm in norms.values()}) > 1:
        sizes = sorted({len(norm) for norm in norms.values()})
        raise Refusal(
            f"parts of one model were given batches of {sizes} samples: one bound cannot hold for them together"
        )
    found = {k: norm.double() for k, norm in norms.items()}
    total = sum(found.values(), torch.zeros(()))
    safe = torch.where(torch.as_tensor(total).isfinite(), total, math.inf) * (1 + ROUNDING)
    return {k: torch.where(norm.isfinite(), norm, 0.0) / safe for k, norm in found.items()}


@torch.library.custom_op("flashdp::share_bound", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def share_bound(sqnorm: Tensor, place: int) -> Tensor:
    """n_b^2 / s_b^2 [B] of the squared norms [B] of one part: clipping that to C clips n_b to s_b C."""
    return _known[place].norm_by_share(sqnorm)


@share_bound.register_fake
def _(sqnorm: Tensor, place: int) -> Tensor:
    return torch.empty_like(sqnorm)
