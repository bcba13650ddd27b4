"""Squared norms of per-sample weight gradients, estimated from their products with Gaussian probes.

    out[b] = |sum_l x_b^T g_lb P_l|_F^2          x [B, T, d], g_l [B, T, p_l], P_l [p_l, probes] -> [B]

is, given x and g, distributed as |M|_F^2 sum_i lambda_i chi^2_probes(i) / probes with M = x_b^T [g_1b g_2b ...] and
lambda the squared singular values of M over |M|_F^2: an unbiased estimate of the squared norm of all these gradients
together (Ullah et al. 2026, arXiv 2605.24879; docs/randomized_clipping.md). It takes 2 T probes (d + sum p_l)
multiplications with additions for each sample, as probes are two bfloat16, where the norm itself takes T d sum p_l, and
memory for neither a product d x p nor the tokens' pairs.

    P_l                       [p_l, probes], drawn into memory: a kernel that drew it for its own 128 tokens took 2.3
                              to 2.8 times as long (H200, 16384 tokens, 64 probes, p of 2048 and 8192), and P_l is
                              small beside g_l
    h = sum_l g_l P_l         [B, T, probes], by programs of 128 tokens
    y = x^T h                 [B, runs, d, probes] float32, by programs of a run of tokens and 64 features

P_l and h are kept as the sums of two bfloat16 (halves.py), side by side. P_l is that of (key, streams_l): probes.py. It
is the same for every sample and in every launch, so estimates do not depend on how a batch is cut.

Rounding. Given P, the sum over tokens is linear, so an entry of y is off by a part of the sum of absolute values, and
all of y by gamma |x_b|_F |h_b|_F at most, by Cauchy and Schwarz. In gamma are two bfloat16 for a float32 in both
products, and sums of blocks as in guard.py, which also says how the result then bounds what is estimated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, example_key, randn, start, widen
from flashdp_compile.kernels.family import Family, Template, supported
from flashdp_compile.kernels.gaussian import word
from flashdp_compile.kernels.guard import gamma, guarded_root
from flashdp_compile.kernels.halves import SPLIT
from flashdp_compile.kernels.operands import argument, layout
from flashdp_compile.kernels.probes import LEAST, MOST, probe_matrix

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
    spec = Projection(tuple(map(layout, gs)), layout(ps[0]), ps[0].shape[0] == 1, _exact(gs), probes)
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


def _exact(operands: Sequence[Tensor]) -> bool:
    return all(t.dtype == torch.bfloat16 for t in operands)


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


def reference(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Tensor:
    x, *gs = widen(x, *gs)
    h = sum(g @ probe_matrix(key, s, g.shape[2], probes, g.dtype) for g, s in zip(gs, streams, strict=True))
    return estimate(x.mT @ h, lengths(x) * lengths(h), x.shape[1])


def lengths(t: Tensor) -> Tensor:
    """|t_b|_F of [B, T, n]."""
    return torch.linalg.vector_norm(t, dim=(1, 2))


def fake(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, *gs))


def specialise(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Projection:
    return Projection(tuple(map(layout, gs)), "inner", True, _exact(gs), probes)


def launch(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Tensor:
    if 0 in (*x.shape, *(size for g in gs for size in g.shape)):
        return x.new_zeros(x.shape[0], dtype=torch.float32)
    h, of_h = project(gs, [draw(key, s, g.shape[2], probes) for g, s in zip(gs, streams, strict=True)])
    y, of_x = sketch(x, h)
    return estimate(y, (of_h.sum(1) * of_x.sum(1)).sqrt(), x.shape[1])


def supports(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> bool:
    return supported(x, *gs) and LEAST <= probes <= MOST and probes & (probes - 1) == 0


def example(case, dtype, device, generator):
    B, T, d, *widths = case
    key = example_key(device)
    gs = [randn((B, T, p), dtype, device, generator) for p in widths]
    return randn((B, T, d), dtype, device, generator), gs, key, [7 + 1000003 * n for n in range(len(gs))], LEAST


FAMILY = Family(
    name="sketch_sqnorm",
    schema="(Tensor x, Tensor[] gs, Tensor key, int[] streams, int probes) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=PROJECT.template,
    cases=((3, 5, 7, 9), (2, 4161, 33, 20, 35), (1, 1, 1, 1), (3, 130, 130, 1, 2), (0, 4, 3, 2), (2, 0, 3, 2)),
    example=example,
    supports=supports,
)
