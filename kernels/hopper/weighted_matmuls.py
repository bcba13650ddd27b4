"""The template of weighted_matmuls in Gluon; the arithmetic is that of its Triton template, in the same order.

`prepare` does once what is the same at every step: see `Family.run`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import add_noises, hopper, product_sums, several, tuning
from flashdp_compile.kernels.common import Launch, cdiv

# Programs take tiles of all layers, as many apart as there are programs. The loading warp makes descriptors for each
# layer, in one of two places in turn: two calls of load_layer. A group's half of a tile are 64 of its 128 rows. Noise
# is added by a launch of its own: drawn here, it took twice as long as memory does, by the groups or by other warps.
TEMPLATE = """
{%- set pointers = ["x_ptr", "g_ptr", "weight_ptr", "out_ptr"] -%}
{%- set sizes = ["PROGRAMS", "B", "T", "D", "P", "TILES_D", "TILES_P", "RUN"] -%}
{%- set strides = ["x_s0", "x_s1", "g_s0", "g_s1", "weight_s0"] -%}
{%- set arguments = parameters(pointers, [], sizes, strides, kinds) ~ "TILES," -%}
{%- macro layer_of(tile) -%}
{{ selected(tile, pointers, [], sizes, strides, kinds) }}
{%- endmacro -%}
{%- set tile_of_number -%}
number, run = number % (TILES_D * TILES_P), number // (TILES_D * TILES_P)
d, p = place(number, TILES_D, TILES_P)
first, end = run * RUN, tl.minimum(run * RUN + RUN, B)
{%- endset -%}
from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import tma

from flashdp_compile.kernels.hopper.parts import ACCUMULATOR, TILE, add_products, landed, load_step, place, ring

STAGES = tl.constexpr({{ tiles.stages }})
TAIL = tl.constexpr({{ tail }})
DTYPE = tl.constexpr({{ dot_type }})


@gluon.jit
def load_layer(
    tile, step,
    {{ arguments | indent(4) }}
    xs, gs, full, empty,
):
    {{ layer_of("tile") | indent(4) }}
    x_desc = tma.make_tensor_descriptor(x_ptr, [B, T, D], [x_s0, x_s1, 1], [1, 64, 64], TILE)
    g_desc = tma.make_tensor_descriptor(g_ptr, [B, T, P], [g_s0, g_s1, 1], [1, 64, 256], TILE)
    mine, programs = number, tl.num_programs(0)
    while mine < PROGRAMS:
        number = mine
        {{ tile_of_number | indent(8) }}
        for b in range(first, end):
            w = tl.load(weight_ptr + b * weight_s0)
            for t in range(0, tl.where(w != 0.0, T, 0), 64):
                step = load_step(x_desc, g_desc, b, t, d, p, step, xs, gs, full, empty, STAGES)
        mine, tile = mine + programs, tile + programs
    return tile, step


{{ load_in_turn("load_layer", "tile", "TILES", arguments, "xs, gs, full, empty") }}


@gluon.jit
def multiply(
    half: tl.constexpr,
    {{ arguments | indent(4) }}
    xs, gs, full, empty,
):
    step = tl.to_tensor(0)
    for tile in range(tl.program_id(0), TILES, tl.num_programs(0)):
        {{ layer_of("tile") | indent(8) }}
        {{ tile_of_number | indent(8) }}
        total = tl.zeros([64, 256], tl.float32, ACCUMULATOR)
        unit = tl.to_tensor(0.0).to(tl.float64)  # what total is to be multiplied by; 0 before the first sample
        for b in range(first, end):
            w = tl.load(weight_ptr + b * weight_s0).to(tl.float64)
            kept = w != 0.0
            ratio = tl.where(kept & (unit != 0.0), unit / w, 1.0).to(tl.float32)
            total = total * ratio
            unit = tl.where(kept & (unit == 0.0), w, unit / ratio.to(tl.float64))
            if kept:
                total, step = add_products(total, step, T, half, TAIL, xs, gs, full, empty, STAGES)
        total = total * unit.to(tl.float32)
        row = d + 64 * half + tl.arange(0, 64, tl.SliceLayout(1, ACCUMULATOR))
        column = p + tl.arange(0, 256, tl.SliceLayout(0, ACCUMULATOR))
        out_ptr += run.to(tl.int64) * D * P
        within = (row < D)[:, None] & (column < P)[None, :]
        tl.store(out_ptr + row.to(tl.int64)[:, None] * P + column[None, :], total, mask=within)


@gluon.jit
def kernel(
    {{ arguments | indent(4) }}
):
    xs = tl.allocate_shared_memory(DTYPE, [2 * STAGES, 1, 64, 64], TILE)
    gs = tl.allocate_shared_memory(DTYPE, [STAGES, 1, 64, 256], TILE)
    full, empty = ring(STAGES)
    {{ specialised(arguments, "xs, gs, full, empty") | indent(4) }}
"""


def prepare(
    chosen: Any, run: int, xs: list[Tensor], gs: list[Tensor], weights: list[Tensor]
) -> Callable[..., list[Tensor]]:
    """Sums of layers with this geometry, by the kernel `chosen`, in runs of so many samples."""
    by_kind = several.kinds(xs, gs, weights)
    number = cdiv(len(weights[0]), run)
    shapes = [(number,) * (number > 1) + (x.shape[2], g.shape[2]) for x, g in zip(xs, gs, strict=True)]
    common, programs = [], 0
    for numbers in by_kind:
        x, g, w = xs[numbers[0]], gs[numbers[0]], weights[numbers[0]]
        d, p = cdiv(x.shape[2], hopper.PRODUCTS.rows), cdiv(g.shape[2], hopper.PRODUCTS.columns)
        sizes = number * d * p, len(w), x.shape[1], x.shape[2], g.shape[2], d, p, run
        common.append((*sizes, *x.stride()[:2], *g.stride()[:2], w.stride(0)))
        programs += number * d * p * len(numbers)
    launch = Launch(chosen, min(programs, tuning.processors(xs[0].device)), **hopper.SETTINGS)
    noise: list[Callable[..., None]] = []

    def sums(
        xs: list[Tensor],
        gs: list[Tensor],
        weights: list[Tensor],
        key: Tensor | None,
        streams: Sequence[int],
        std: float,
    ) -> list[Tensor]:
        parts = [xs[0].new_empty(shape, dtype=torch.float32) for shape in shapes]
        own = list(zip(xs, gs, weights, parts, strict=True))
        launch(xs[0], *several.arguments(own, common, by_kind), programs)
        streams = streams or [0] * len(xs)  # without noise there need not be any
        if number > 1:
            return product_sums.launch(parts, None, key, streams, std)
        if key is not None:
            if not noise:
                noise.append(add_noises.prepare(parts))
            noise[0](parts, key, streams, std)
        return parts

    return sums
