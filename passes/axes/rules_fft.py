"""Fourier transforms along feature dimensions."""

from __future__ import annotations

from typing import Any

from flashdp_compile.passes.axes.domain import Batched, Reject, Site, State
from flashdp_compile.passes.axes.registry import rule


@rule("aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c", linear=True)
def fft(site: Site, x: Batched, dims: list[int], *rest: Any) -> State:
    """A transform along the batch would combine all samples."""
    if x.dim in [d % site.arg_rank() for d in dims]:
        raise Reject("it transforms along the batch", "transform a feature dimension")
    return Batched(x.dim, x.outer, x.inner)
