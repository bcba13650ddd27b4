"""Clipped weight gradients of several layers, straight from their factors, in one launch.

    out_i = sum_b w_ib x_ib^T g_ib (+ noise)     x_i [B, T, d_i], g_i [B, T, p_i], w_i [B] -> [d_i, p_i]

Neither x nor g is scaled and rounded to its own narrow dtype: products are accumulated in float32, onto the sum of the
samples before them. In front of every sample that sum is scaled, in float32, to units of the sample's own weight, so
what is added has the norm that was clipped, to within float32 rounding of the sum. The units are kept in float64, as
what the sum was really scaled by: else the rounding of ratios would add up over the samples. A tile has one accumulator
then, and two programs fit onto a multiprocessor, of which one scales while the other multiplies. No ratio of two
weights overflows: clip.py keeps norms between 2^-60 and 2^64. A sample of weight 0 is not read. With a key, what
add_noise would add to out_i for (key, streams_i) is added as well; a compiler may round the two once where it would
twice.

One layer alone seldom fills the last round of programs on a device, and costs the host a launch. Layers of equal sizes
and strides are a kind: what is common to a kind is passed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian, hopper, product_sums, several, tuning
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, example_key, randn, sample_products, start
from flashdp_compile.kernels.family import Family, supported
from flashdp_compile.kernels.hopper import weighted_matmuls as warp_specialised
from flashdp_compile.kernels.operands import layout, sources, strides, tiles_for
from flashdp_compile.kernels.tuning import Tiles


def reference(
    xs: list[Tensor], gs: list[Tensor], weights: list[Tensor], key: Tensor | None, streams: list[int], std: float
) -> list[Tensor]:
    sums = (_reference(x, g, w) for x, g, w in zip(xs, gs, weights, strict=True))
    if key is None:
        return list(sums)
    return [gaussian.reference(total, key, stream, std) for total, stream in zip(sums, streams, strict=True)]


def _reference(x: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    out = x.new_zeros((x.shape[2], g.shape[2]), dtype=accumulator(x, g))
    kept = (weights != 0)[:, None, None]
    x, g = x.where(kept, x.new_zeros(())), g.where(kept, g.new_zeros(()))
    for run, products in sample_products(x, g):
        out += torch.tensordot(weights[run].to(out.dtype), products, 1)
    return out


def fake(xs: list[Tensor], gs: list[Tensor], weights: list[Tensor], *noise: Any) -> list[Tensor]:
    return [x.new_empty((x.shape[2], g.shape[2]), dtype=accumulator(x, g)) for x, g in zip(xs, gs, strict=True)]


@dataclass(frozen=True)
class Spec:
    dot_type: str
    x: str  # layouts, see operands.py
    g: str
    tiles: Tiles
    noise: bool
    kinds: tuple[int, ...]  # how many layers are of each
    hopper: bool  # whether by hopper.weighted_matmuls
    tail: int  # see hopper.tail


def specialise(xs: list[Tensor], gs: list[Tensor], weights: list[Tensor], key: Tensor | None, *noise: Any) -> Spec:
    x, g = xs[0], gs[0]
    pairs = list(zip(xs, gs, strict=True))
    tail = 0
    if on_hopper := hopper.fits(pairs):
        tail = hopper.tail(x.shape[1] for x in xs)
        tiles = hopper.PRODUCTS
    else:
        tiles = tiles_for("weighted_matmul", [x, g], *((x.shape[2], g.shape[2]) for x, g in pairs))
        if isinstance(x.shape[1], int):
            tiles = tuning.for_tokens(tiles, x.shape[1])
    # a Philox block makes four elements: they must lie in one row of the tile
    noise_inside = key is not None and all(g.shape[2] % 4 == 0 for g in gs) and not on_hopper
    kinds = tuple(map(len, several.kinds(xs, gs, weights)))
    return Spec(dot_type(x, g), layout(x), layout(g), tiles, noise_inside, kinds, on_hopper, tail)


# Programs [layers, runs, tiles]: where the tiles alone would leave multiprocessors idle, each takes a run of
# the samples.
TRITON = """
{%- set pointers = [source("x", x, kinds), source("g", g, kinds), "weight_ptr", "out_ptr"] -%}
{%- set numbers = ["noise_stream"] if noise else [] -%}
{%- set sizes = ["PROGRAMS", "B", "T", "D", "P", "TILES_D", "TILES_P", "RUN"] -%}
{%- set strides = ["x_s0", "x_s1"] + (["x_s2"] if x == "strided" else []) + ["g_s0", "g_s1"]
    + (["g_s2"] if g == "strided" else []) + ["weight_s0"] -%}
import triton
import triton.language as tl


@triton.jit
def kernel(
    {{ parameters(pointers, numbers, sizes, strides, kinds) | indent(4) -}}
    {{ "    key_ptr, std," if noise }}
):
    {{ selected("tl.program_id(0)", pointers, numbers, sizes, strides, kinds) | indent(4) }}
    number, run = number % (TILES_D * TILES_P), number // (TILES_D * TILES_P)
    {{ swizzled("number", tiles) | indent(4) }}
    {{ described("x", x, "B", "T", "D", tiles.depth, tiles.rows, kinds) }}
    {{ described("g", g, "B", "T", "P", tiles.depth, tiles.columns, kinds) }}
    total = tl.zeros([{{ tiles.rows }}, {{ tiles.columns }}], tl.float32)
    unit = tl.full([], 0.0, tl.float64)  # what total is to be multiplied by; 0 before the first sample
    for sample in range(run * RUN, tl.minimum(run * RUN + RUN, B)):
        b = tl.full([], sample, tl.int32)
        w = tl.load(weight_ptr + b * weight_s0).to(tl.float64)
        kept = w != 0.0
        ratio = tl.where(kept & (unit != 0.0), unit / w, 1.0).to(tl.float32)
        total *= ratio
        unit = tl.where(kept & (unit == 0.0), w, unit / ratio.to(tl.float64))
        for t in range(tl.where(kept, 0, T), T, {{ tiles.depth }}):
            b_x = {{ tile("x", x, "b", "t", tiles.depth, "T", "d", tiles.rows, "D") }}.to({{ dot_type }})
            b_g = {{ tile("g", g, "b", "t", tiles.depth, "T", "p", tiles.columns, "P") }}.to({{ dot_type }})
            total = {{ dot("tl.trans(b_x)", "b_g", "total") }}
    total *= unit.to(tl.float32)
    {{ store_tile("out", "run", "total", tiles) }}
{% if noise %}
{% set rows, quarter = 8, tiles.columns // 4 %}
    tl.debug_barrier()  # a thread now reads what others have stored
    for row in range(d, tl.minimum(d + {{ tiles.rows }}, D), {{ rows }}):  # noise for a whole tile would not fit
        line = (row + tl.arange(0, {{ rows }}))[:, None].to(tl.int64)
        {{ draw_normals("(line * P + p) // 4 + tl.arange(0, %d)[None, :]" % quarter,
                        "%d, %d" % (rows, tiles.columns)) | indent(8) }}
        column = p + tl.arange(0, {{ tiles.columns }})[None, :]
        within = (line < D) & (column < P)
        there = out_ptr + line * P + column
        tl.store(there, tl.load(there, mask=within) + tl.full([], std, tl.float32) * normals, mask=within)
{% endif %}
"""
TEMPLATE = hopper.either(warp_specialised.TEMPLATE, TRITON)


def launch(
    xs: list[Tensor],
    gs: list[Tensor],
    weights: list[Tensor],
    key: Tensor | None = None,
    streams: Sequence[int] = (),
    std: float = 0.0,
) -> list[Tensor]:
    """Layers of which all have the layouts of the first, and as many samples."""
    streams = streams or [0] * len(xs)  # without noise there need not be any
    if any(0 in (*x.shape, *g.shape) for x, g in zip(xs, gs, strict=True)):
        return [_nothing(x, g, key, stream, std) for x, g, stream in zip(xs, gs, streams, strict=True)]
    spec = specialise(xs, gs, weights, key)
    if spec.hopper:
        return prepare(xs, gs, weights, key, streams, std)(xs, gs, weights, key, streams, std)
    tiles, by_kind = spec.tiles, several.kinds(xs, gs, weights)
    counts = [(cdiv(x.shape[2], tiles.rows), cdiv(g.shape[2], tiles.columns)) for x, g in zip(xs, gs, strict=True)]
    run = samples_of_a_run(xs, gs, weights, tiles)
    B = len(weights[0])
    number = cdiv(B, run)
    out = [x.new_empty((number, x.shape[2], g.shape[2]), dtype=torch.float32) for x, g in zip(xs, gs, strict=True)]
    inside = spec.noise and number == 1  # else the sum of the runs adds it, or a kernel of its own
    loaded_xs = sources(xs, spec.x, tiles.depth, tiles.rows)
    loaded_gs = sources(gs, spec.g, tiles.depth, tiles.columns)
    own: list[tuple[Any, ...]] = list(zip(loaded_xs, loaded_gs, weights, out, strict=True))
    if inside:
        own = [(*tensors, gaussian.word(stream)) for tensors, stream in zip(own, streams, strict=True)]
    common = []
    for first in (numbers[0] for numbers in by_kind):
        x, g, (d, p) = xs[first], gs[first], counts[first]
        sizes = number * d * p, B, x.shape[1], x.shape[2], g.shape[2], d, p, run
        common.append((*sizes, *strides(x, spec.x), *strides(g, spec.g), weights[first].stride(0)))
    arguments = several.arguments(own, common, by_kind) + ([key, std] if inside else [])
    programs = sum(number * d * p for d, p in counts)
    chosen = kernel(FAMILY, replace(spec, noise=inside))
    start(chosen, programs, xs[0], *arguments, num_warps=tiles.warps, num_stages=tiles.stages)
    if number == 1 and (key is None or inside):
        return [t.squeeze(0) for t in out]
    if number == 1:
        return [gaussian.launch(t.squeeze(0), key, stream, std) for t, stream in zip(out, streams, strict=True)]
    return product_sums.launch(out, None, key, streams, std)


def prepare(
    xs: list[Tensor], gs: list[Tensor], weights: list[Tensor], key: Tensor | None, streams: Sequence[int], std: float
) -> Callable[..., list[Tensor]]:
    spec = specialise(xs, gs, weights, key)
    run = samples_of_a_run(xs, gs, weights, spec.tiles)
    return warp_specialised.prepare(kernel(FAMILY, spec), run, xs, gs, weights)


def _nothing(x: Tensor, g: Tensor, key: Tensor | None, stream: int, std: float) -> Tensor:
    nothing = x.new_zeros((x.shape[2], g.shape[2]), dtype=torch.float32)
    return nothing if key is None else gaussian.launch(nothing, key, stream, std)


# What a run costs, in multiplications and additions per element of its partial sum, which is written and read again:
# 8 bytes at 3 TB/s are worth as much as 1600 operations at 600 TFLOP/s.
RUN_COST = 1600


def samples_of_a_run(xs: list[Tensor], gs: list[Tensor], weights: list[Tensor], tiles: Tiles) -> int:
    count = sum(cdiv(x.shape[2], tiles.rows) * cdiv(g.shape[2], tiles.columns) for x, g in zip(xs, gs, strict=True))
    B, T = len(weights[0]), max(x.shape[1] for x in xs)
    return cdiv(B, runs(B, T, count, tuning.room(tiles, xs[0].device)))


def runs(samples: int, tokens: int, tiles: int, room: int) -> int:
    """Into how many runs to cut the samples, with `tiles` programs for each, on a device with room for so many."""

    def cost(count: int) -> float:
        waves = cdiv(tiles * count, room) * room / tiles  # what all could do while the last ones work
        return waves * 2 * tokens * cdiv(samples, count) + (RUN_COST * count if count > 1 else 0)

    return min(range(1, min(samples, room) + 1), key=cost)


def stays_op(xs: list[Tensor], gs: list[Tensor], *rest: Any) -> bool:
    return hopper.fits(list(zip(xs, gs, strict=True)))


def supports(
    xs: list[Tensor], gs: list[Tensor], weights: list[Tensor], key: Tensor | None, streams: list[int], std: float
) -> bool:
    alike = {(x.shape[0], layout(x), layout(g)) for x, g in zip(xs, gs, strict=True)}
    return supported(*xs, *gs, *weights) and len(alike) == 1


def example(case, dtype, device, generator):
    B, T, *widths = case
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    xs = [randn((B, T, d), dtype, device, generator) for d, _ in pairs]
    gs = [randn((B, T, p), dtype, device, generator) for _, p in pairs]
    key = example_key(device)
    return (
        xs,
        gs,
        [weights * (1 + n) for n in range(len(pairs))],
        key,
        [7 + 1000003 * n for n in range(len(pairs))],
        0.7,
    )


FAMILY = Family(
    name="weighted_matmuls",
    schema="(Tensor[] xs, Tensor[] gs, Tensor[] weights, Tensor? key, int[] streams, float std) -> Tensor[]",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    # B, T, d_0, p_0, d_1, p_1, ...
    cases=((3, 5, 7, 9), (4, 65, 63, 64, 65, 8, 63, 64, 130, 16), (1, 1, 1, 1, 1, 1), (0, 4, 3, 2, 3, 2), (2, 0, 3, 2)),
    example=example,
    supports=supports,
    stays_op=stays_op,
    prepare=prepare,
)
