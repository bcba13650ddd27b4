"""Kernels whose warps do different things, for compute capability 9.0 (H100, H200).

One warp loads tiles through TMA descriptors into a ring in shared memory; two warp groups of four warps each take half
of an output tile of 128 by 256 from it. One group multiplies while the other scales, rounds or stores, and the loads of
the next tile never wait for the end of this one: what Triton's own pipelines cannot do, and what cuBLAS does. They are
written in Gluon, Triton's language in which layouts, copies and barriers are explicit. No interpreter runs it: a CPU
compiles them for sm_90 (tests/kernels/test_offline_compile.py), a GPU compares them with their twins.

A family takes them where `fits` says so, and its Triton template everywhere else. Inductor cannot write Gluon into its
own code, so such an op stays a call, which costs the host more than a launch: see `Family.run`.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from flashdp_compile.kernels import tuning
from flashdp_compile.kernels.common import cdiv
from flashdp_compile.kernels.operands import TMA, layout
from flashdp_compile.kernels.tuning import Tiles

PRODUCTS = Tiles(128, 256, 64, 8, 4)
STORED = Tiles(128, 256, 64, 8, 3)  # a stage less: tiles on their way out take its place
PAIRS = Tiles(128, 128, 64, 8, 6)  # of Gram matrices
SETTINGS = {"num_warps": 4, "maxnreg": 168}  # of a launch: three groups of four warps fill a multiprocessor
WASTE = 1.5  # at most so many times as many elements in the tiles as in the results
LEAST_TOKENS = 32


def fits(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the operands of these products, [B, T, d] and [B, T, p], can be loaded and fill the tiles."""
    if not can_load([t for pair in pairs for t in pair]):
        return False
    made = sum(cdiv(x.shape[2], PRODUCTS.rows) * cdiv(g.shape[2], PRODUCTS.columns) for x, g in pairs)
    return made * PRODUCTS.rows * PRODUCTS.columns <= WASTE * sum(x.shape[2] * g.shape[2] for x, g in pairs)


def can_load(operands: list[Tensor]) -> bool:
    """Whether all are [B, T, .] of one 16-bit dtype that a descriptor reads, on a device with these kernels."""
    if not available(operands[0].device) or len({t.dtype for t in operands}) > 1:
        return False
    return all(_whole(t.shape) and _whole(t.stride()) and layout(t) == TMA for t in operands) and (
        min(t.shape[1] for t in operands) >= LEAST_TOKENS
    )


def _whole(numbers: tuple[int, ...]) -> bool:
    """Whether all are known, and none is 0."""
    a, b, c = numbers
    return type(a) is type(b) is type(c) is int and a != 0 and b != 0 and c != 0


def available(device: torch.device) -> bool:
    """Whether these kernels run on a device."""
    return tuning.architecture(device) == "sm_90" and _has_gluon()


@functools.cache
def _has_gluon() -> bool:
    from flashdp_compile.compat import has_gluon  # late: it looks at Triton

    return has_gluon()


def tail(tokens: Iterable[int]) -> int:
    """How many of the last 64 tokens of a sample to multiply: what lies beyond a sample is zero."""
    rest = max((n - 1) % 64 + 1 for n in tokens)
    return 16 if rest <= 16 else 32 if rest <= 32 else 64


def either(gluon: str, triton: str) -> str:
    """The template that takes one or the other, as its specialisation's `hopper` says."""
    return f"{{% if hopper %}}{gluon}{{% else %}}{triton}{{% endif %}}"
