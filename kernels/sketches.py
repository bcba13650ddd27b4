"""What all estimates of norms are made of: probes, what projects on them, and what sketches the other side.

    P         [p, probes], drawn into memory: a kernel that drew it for its own 128 tokens took 2.3 to 2.8 times as long
              (H200, 16384 tokens, 64 probes, p of 2048 and 8192), and P is small beside g
    h = g P   [B, T, probes], by programs of 128 tokens
    y = x^T h [B, d, probes] float32, by programs of a run of tokens and 64 features

P and h are kept as the sums of two bfloat16 (halves.py), side by side. P is that of (key, stream): probes.py. It is the
same for every sample and in every launch, so estimates do not depend on how a batch is cut.

Rounding. Given P, the sum over tokens is linear, so an entry of y is off by a part of the sum of absolute values, and
all of y by gamma |x_b|_F |h_b|_F at most, by Cauchy and Schwarz. In gamma are two bfloat16 for a float32 in both
products, and sums of blocks as in guard.py, which also says how the result then bounds what is estimated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import cdiv, start
from flashdp_compile.kernels.family import Template, supported
from flashdp_compile.kernels.gaussian import word
from flashdp_compile.kernels.guard import gamma, guarded_root
from flashdp_compile.kernels.halves import SPLIT
from flashdp_compile.kernels.operands import argument, layout
from flashdp_compile.kernels.probes import LEAST, MOST

DEPTH = 64  # what tensor cores sum by themselves
SKETCHED = 64, 4, 3  # rows of a tile, warps, stages: the fastest of eight on an H200
RUN = 4096  # tokens of a program, or more where there are many
RUNS = 8  # at most


@dataclass(frozen=True)
class Drawing:
    """Settings of the kernel that draws P."""

    probes: int
    rows: int = 16


DRAW = Template(
    "draw_probes",
    """
import triton
import triton.language as tl


@triton.jit
def kernel(key_ptr, noise_stream, out_ptr, P):
    row = tl.program_id(0) * {{ rows }} + tl.arange(0, {{ rows }}).to(tl.int64)
    {{ draw_normals("row[:, None] * %d + tl.arange(0, %d)[None, :]" % (probes // 4, probes // 4),
                    "%d, %d" % (rows, probes)) | indent(4) }}
    normals *= {{ probes ** -0.5 }}
    {{ in_halves("normals", "normals") | indent(4) }}
    where = out_ptr + row[:, None] * {{ 2 * probes }} + tl.arange(0, {{ probes }})[None, :]
    tl.store(where, normals_hi, mask=(row < P)[:, None])
    tl.store(where + {{ probes }}, normals_lo, mask=(row < P)[:, None])
""",
)


def draw(key: Tensor, stream: int, rows: int, probes: int) -> Tensor:
    """P as halves [1, rows, 2 probes]."""
    spec = Drawing(probes)
    out = key.new_empty((1, rows, 2 * probes), dtype=torch.bfloat16)
    start(kernel(DRAW, spec), cdiv(rows, spec.rows), key, key, word(stream), out, rows)
    return out


def in_halves(value: Tensor) -> Tensor:
    """[..., n] of float32 as halves [..., 2 n]."""
    high = value.to(torch.bfloat16)
    return torch.cat([high, (value - high.to(torch.float32)).to(torch.bfloat16)], -1)


@dataclass(frozen=True)
class Projection:
    """Settings of the kernel that makes h."""

    gs: tuple[str, ...]  # layouts, see operands.py
    p: str
    shared: bool  # p is that of all samples
    exact: bool  # operands are bfloat16
    probes: int
    rows: int = 128
    depth: int = DEPTH


PROJECT = Template(
    "project",
    """
import triton
import triton.language as tl


@triton.jit
def kernel(
    {% for g in gs %}
    {{ operand("g%d" % loop.index0, g) }}, {{ operand("p%d" % loop.index0, p) }}, P{{ loop.index0 }},
    {% endfor %}
    h_ptr, part_ptr, T, TILES,
):
    b = tl.program_id(0) // TILES
    t = (tl.program_id(0) % TILES) * {{ rows }}
    of = {{ "b * 0" if shared else "b" }}
    acc = tl.zeros([{{ rows }}, {{ probes }}], tl.float32)
{% for g in gs %}
{% set n = loop.index0 %}
    for i in range(0, P{{ n }}, {{ depth }}):
        b_g = {{ tile("g%d" % n, g, "b", "t", rows, "T", "i", depth, "P%d" % n) }}
        b_p_hi = {{ tile("p%d" % n, p, "of", "i", depth, "P%d" % n, "0", probes, probes) }}
        b_p_lo = {{ tile("p%d" % n, p, "of", "i", depth, "P%d" % n, probes, probes, 2 * probes) }}
{% if exact %}
        b_g_hi = b_g
{% else %}
        wide = b_g.to(tl.float32)
        {{ in_halves("b_g", "wide") | indent(8) }}
{% endif %}
        {{ product("b_g", "b_p", exact, depth) | indent(8) }}
        acc += part
{% endfor %}
    at = t + tl.arange(0, {{ rows }})
    where = h_ptr + (b.to(tl.int64) * T + at)[:, None] * {{ 2 * probes }} + tl.arange(0, {{ probes }})[None, :]
    {{ in_halves("acc", "acc") | indent(4) }}
    tl.store(where, acc_hi, mask=(at < T)[:, None])
    tl.store(where + {{ probes }}, acc_lo, mask=(at < T)[:, None])
    tl.store(part_ptr + tl.program_id(0), tl.sum(acc * acc))
""",
)


def project(gs: Sequence[Tensor], ps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """sum_l g_l p_l as halves [B, T, 2 probes], for halves p_l [1, p_l, 2 probes], or one for each sample; and its
    squared length in parts [B, n]. B, T and p_l are not 0."""
    (B, T, _), probes = gs[0].shape, ps[0].shape[2] // 2
    spec = projection(gs, probes, ps[0].shape[0] == 1, layout(ps[0]))
    tiles = cdiv(T, spec.rows)
    h = gs[0].new_empty((B, T, 2 * probes), dtype=torch.bfloat16)
    parts = gs[0].new_empty((B, tiles), dtype=torch.float32)
    operands = [
        value
        for g, how, p in zip(gs, spec.gs, ps, strict=True)
        for value in (
            *argument(g, how, spec.rows, spec.depth),
            *argument(p, spec.p, spec.depth, probes),
            g.shape[2],
        )
    ]
    chosen = kernel(PROJECT, spec)
    start(chosen, B * tiles, gs[0], *operands, h, parts, T, tiles, num_stages=4 if spec.exact else 2)
    return h, parts


def projection(gs: Sequence[Tensor], probes: int, shared: bool = True, p: str = "inner") -> Projection:
    """Settings of `project`; `p` is the layout of the probes."""
    return Projection(tuple(map(layout, gs)), p, shared, _exact(gs), probes)


def _exact(operands: Sequence[Tensor]) -> bool:
    return all(t.dtype == torch.bfloat16 for t in operands)


def supports(operands: Sequence[Tensor], probes: int) -> bool:
    """Whether kernels can estimate norms from so many probes."""
    return supported(*operands) and LEAST <= probes <= MOST and probes & (probes - 1) == 0


@dataclass(frozen=True)
class Sketching:
    """Settings of the kernel that makes y."""

    x: str  # layouts
    h: str
    exact: bool
    probes: int
    rows: int
    depth: int = DEPTH


SKETCH = Template(
    "sketch",
    """
import triton
import triton.language as tl


@triton.jit
def kernel({{ operand("x", x) }}, {{ operand("h", h) }}, y_ptr, part_ptr, T, D, TILES, RUNS, RUN):
    number = tl.program_id(0) // TILES
    b, run = number // RUNS, number % RUNS
    d = (tl.program_id(0) % TILES) * {{ rows }}
    acc = tl.zeros([{{ rows }}, {{ probes }}], tl.float32)
    squares = tl.zeros([{{ depth }}, {{ rows }}], tl.float32)  # one sum at the end: threads would wait for each other
    for t in range(run * RUN, tl.minimum(run * RUN + RUN, T), {{ depth }}):
        b_x = {{ tile("x", x, "b", "t", depth, "T", "d", rows, "D") }}
        b_h_hi = {{ tile("h", h, "b", "t", depth, "T", "0", probes, probes) }}
        b_h_lo = {{ tile("h", h, "b", "t", depth, "T", probes, probes, 2 * probes) }}
        wide = b_x.to(tl.float32)
        squares += wide * wide
{% if exact %}
        left_hi = tl.trans(b_x)
{% else %}
        {{ in_halves("b_x", "wide") | indent(8) }}
        left_hi, left_lo = tl.trans(b_x_hi), tl.trans(b_x_lo)
{% endif %}
        {{ product("left", "b_h", exact, depth) | indent(8) }}
        acc += part
    row = d + tl.arange(0, {{ rows }})
    where = y_ptr + (number.to(tl.int64) * D + row)[:, None] * {{ probes }} + tl.arange(0, {{ probes }})[None, :]
    tl.store(where, acc, mask=(row < D)[:, None])
    tl.store(part_ptr + tl.program_id(0), tl.sum(squares))
""",
)


def sketch(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, d, probes], and |x_b|_F^2 in parts [B, n]. B, T and d are not 0.

    How tokens are cut into runs depends on their number alone, so that samples have the same bits in every batch.
    """
    (B, T, D), probes = x.shape, h.shape[2] // 2
    rows, warps, stages = SKETCHED
    spec = Sketching(layout(x), layout(h), _exact([x]), probes, rows)
    run = max(RUN, cdiv(cdiv(T, RUNS), DEPTH) * DEPTH)
    tiles, runs = cdiv(D, spec.rows), cdiv(T, run)
    y = x.new_empty((B, runs, D, probes), dtype=torch.float32)
    parts = x.new_empty((B, runs * tiles), dtype=torch.float32)
    operands = *argument(x, spec.x, spec.depth, spec.rows), *argument(h, spec.h, spec.depth, probes)
    sizes = T, D, tiles, runs, run
    launched = kernel(SKETCH, spec), B * runs * tiles, x, *operands, y, parts, *sizes
    start(*launched, num_warps=warps, num_stages=stages)
    return y.squeeze(1) if runs == 1 else y.sum(1), parts


def estimate(y: Tensor, length: Tensor, tokens: int) -> Tensor:
    """|y_b|_F^2 [B], raised to what rounding may have hidden. `length` is |x_b|_F |h_b|_F, or a sum of several."""
    error = gamma(y.dtype, max(cdiv(tokens, DEPTH), 1))
    if y.dtype == torch.float32:
        error += 2 * SPLIT
    return guarded_root(y.square().sum((1, 2)), error * length)


def lengths(t: Tensor) -> Tensor:
    """|t_b|_F of [B, T, n]."""
    return torch.linalg.vector_norm(t, dim=(1, 2))
