"""Clipped weight gradient straight from the factors.

    out = sum_b w_b x_b^T g_b (+ noise)          x [B, T, d], g [B, T, p], weights [B] -> [d, p]

Neither x nor g is scaled and rounded to its own narrow dtype: products are accumulated in float32, onto the sum of the
samples before them. In front of every sample that sum is scaled, in float32, to units of the sample's own weight, so
what is added has the norm that was clipped, to within float32 rounding of the sum. The units are kept in float64, as
what the sum was really scaled by: else the rounding of ratios would add up over the samples. A tile has one accumulator
then, and two programs fit onto a multiprocessor, of which one scales while the other multiplies. No ratio of two
weights overflows: clip.py keeps norms between 2^-60 and 2^64. A sample of weight 0 is not read. With a key, what
add_noise would add to the sum is added as well; a compiler may round the two once where it would twice.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian, product_sum, tuning
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, randn, sample_products, start
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.operands import argument, layout, tiles_for
from flashdp_compile.kernels.tuning import Tiles


def reference(
    x: Tensor, g: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0
) -> Tensor:
    out = x.new_zeros((x.shape[2], g.shape[2]), dtype=accumulator(x, g))
    kept = (weights != 0)[:, None, None]
    x, g = x.where(kept, x.new_zeros(())), g.where(kept, g.new_zeros(()))
    for run, products in sample_products(x, g):
        out += torch.tensordot(weights[run].to(out.dtype), products, 1)
    return out if key is None else gaussian.reference(out, key, stream, std)


def fake(x: Tensor, g: Tensor, weights: Tensor, *noise: Any) -> Tensor:
    return x.new_empty((x.shape[2], g.shape[2]), dtype=accumulator(x, g))


@dataclass(frozen=True)
class Spec:
    dot_type: str
    x: str  # layouts, see operands.py
    g: str
    tiles: Tiles
    noise: bool


def specialise(x: Tensor, g: Tensor, weights: Tensor, key: Tensor | None = None, *noise: Any) -> Spec:
    tiles = tiles_for("weighted_matmul", [x, g], x.shape[2], g.shape[2])
    if isinstance(x.shape[1], int):
        tiles = tuning.for_tokens(tiles, x.shape[1])
    # a Philox block makes four elements: they must lie in one row of the tile
    return Spec(dot_type(x, g), layout(x), layout(g), tiles, key is not None and g.shape[2] % 4 == 0)


# Programs [tiles, runs]: where the tiles alone would leave multiprocessors idle, each takes a run of the samples.
TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    {{ operand("x", x) }}, {{ operand("g", g) }}, weight_ptr, weight_s0,
    {% if noise %}key_ptr, noise_stream, std, {% endif %}out_ptr, B, T, D, P, TILES_D, TILES_P, RUN,
):
    number, run = tl.program_id(0) % (TILES_D * TILES_P), tl.program_id(0) // (TILES_D * TILES_P)
    {{ swizzled("number", tiles) | indent(4) }}
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
{% if noise %}
{% set quarter = tiles.columns // 4 %}
    rows = (d + tl.arange(0, {{ tiles.rows }}))[:, None].to(tl.int64)
    {{ draw_normals("(rows * P + p) // 4 + tl.arange(0, %d)[None, :]" % quarter,
                    "%d, %d" % (tiles.rows, tiles.columns)) | indent(4) }}
    total += tl.full([], std, tl.float32) * normals
{% endif %}
    {{ store_tile("out", "run", "total", tiles) }}
"""


def launch(
    x: Tensor, g: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0
) -> Tensor:
    (B, T, D), P = x.shape, g.shape[2]
    spec = specialise(x, g, weights, key)
    tiles = spec.tiles
    count = cdiv(D, tiles.rows), cdiv(P, tiles.columns)
    if 0 in (B, T, *count):
        nothing = x.new_zeros((D, P), dtype=torch.float32)
        return nothing if key is None else gaussian.launch(nothing, key, stream, std)
    run = cdiv(B, runs(B, T, count[0] * count[1], tuning.room(tiles, x.device)))
    out = x.new_empty((cdiv(B, run), D, P), dtype=torch.float32)
    loaded = *argument(x, spec.x, tiles.depth, tiles.rows), *argument(g, spec.g, tiles.depth, tiles.columns)
    inside = spec.noise and len(out) == 1  # else the sum of the runs adds it, or a kernel of its own
    noise = (key, gaussian.word(stream), std) if inside else ()
    arguments = (*loaded, weights, weights.stride(0), *noise, out, B, T, D, P, *count, run)
    programs = len(out) * count[0] * count[1]
    chosen = kernel(FAMILY, replace(spec, noise=inside))
    start(chosen, programs, x, *arguments, num_warps=tiles.warps, num_stages=tiles.stages)
    if len(out) > 1:
        return product_sum.launch(out, None, key, stream, std)
    return out[0] if key is None or inside else gaussian.launch(out[0], key, stream, std)


# What a run costs, in multiplications and additions per element of its partial sum, which is written and read again:
# 8 bytes at 3 TB/s are worth as much as 1600 operations at 600 TFLOP/s.
RUN_COST = 1600


def runs(samples: int, tokens: int, tiles: int, room: int) -> int:
    """Into how many runs to cut the samples, with `tiles` programs for each, on a device with room for so many."""

    def cost(count: int) -> float:
        waves = cdiv(tiles * count, room) * room / tiles  # what all could do while the last ones work
        return waves * 2 * tokens * cdiv(samples, count) + (RUN_COST * count if count > 1 else 0)

    return min(range(1, min(samples, room) + 1), key=cost)


def example(case, dtype, device, generator):
    B, T, d, p = case
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    return randn((B, T, d), dtype, device, generator), randn((B, T, p), dtype, device, generator), weights


FAMILY = Family(
    name="weighted_matmul",
    schema="(Tensor x, Tensor g, Tensor weights, Tensor? key=None, int stream=0, float std=0.0) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 5, 7, 9), (4, 65, 63, 65), (1, 1, 1, 1), (2, 3, 130, 1), (0, 4, 3, 2), (2, 0, 3, 2)),  # B, T, d, p
    example=example,
)
