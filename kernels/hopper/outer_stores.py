"""The template of outer_stores, in Gluon. `prepare` does once what is the same at every step: see `Family.run`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import hopper, several, tuning
from flashdp_compile.kernels.common import Launch, cdiv

# Programs take tiles of all layers and samples, as many apart as there are programs. The loading warp makes descriptors
# for each layer, in one of two places in turn: made for each tile, they cost 8 percent. Those of the products are made
# once, by each group for itself. A group rounds its half of a tile into shared memory, from where it leaves while the
# group multiplies the next one.
TEMPLATE = """
{%- set pointers = ["x_ptr", "g_ptr"] -%}
{%- set numbers = ["row", "slot", "store"] -%}
{%- set sizes = ["PROGRAMS", "T", "D", "P", "TILES_D", "TILES_P"] -%}
{%- set strides = ["x_s0", "x_s1", "g_s0", "g_s1"] -%}
{%- set arguments -%}
{{ parameters(pointers, numbers, sizes, strides, kinds) }}
{%- for store in range(stores) %}
store_ptr_{{ store }}, ROWS_{{ store }}, STORE_D_{{ store }}, STORE_P_{{ store }},
{% endfor -%}
part_ptr, B, SLOTS, TILES,
{%- endset -%}
{%- macro layer_of(tile) -%}
{{ selected(tile, pointers, numbers, sizes, strides, kinds) }}
{%- endmacro -%}
{%- set tile_of_number -%}
b, number = number // (TILES_D * TILES_P), number % (TILES_D * TILES_P)
d, p = place(number, TILES_D, TILES_P)
{%- endset -%}
from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from flashdp_compile.kernels.hopper.parts import ACCUMULATOR, TILE, add_products, landed, load_step, place, ring

STAGES = tl.constexpr({{ tiles.stages }})
TAIL = tl.constexpr({{ tail }})
DTYPE = tl.constexpr({{ dot_type }})


@gluon.jit
def load_layer(
    tile, step,
    {{ arguments | indent(4) }}
    xs, gs, products, full, empty,
):
    {{ layer_of("tile") | indent(4) }}
    x_desc = tma.make_tensor_descriptor(x_ptr, [B, T, D], [x_s0, x_s1, 1], [1, 64, 64], TILE)
    g_desc = tma.make_tensor_descriptor(g_ptr, [B, T, P], [g_s0, g_s1, 1], [1, 64, 256], TILE)
    mine, programs = number, tl.num_programs(0)
    while mine < PROGRAMS:
        number = mine
        {{ tile_of_number | indent(8) }}
        for t in range(0, T, 64):
            step = load_step(x_desc, g_desc, b, t, d, p, step, xs, gs, full, empty, STAGES)
        mine, tile = mine + programs, tile + programs
    return tile, step


{{ load_in_turn("load_layer", "tile", "TILES", arguments, "xs, gs, products, full, empty") }}


@gluon.jit
def multiply(
    half: tl.constexpr,
    {{ arguments | indent(4) }}
    xs, gs, products, full, empty,
):
{% for store in range(stores) %}
    near = tl.to_tensor(0) + STORE_P_{{ store }}
    desc_{{ store }} = tma.make_tensor_descriptor(
        store_ptr_{{ store }}, [ROWS_{{ store }}, STORE_D_{{ store }}, STORE_P_{{ store }}],
        [near.to(tl.int64) * STORE_D_{{ store }}, near.to(tl.int64), 1], [1, 64, 256], TILE
    )
{% endfor %}
    step = tl.to_tensor(0)
    for tile in range(tl.program_id(0), TILES, tl.num_programs(0)):
        {{ layer_of("tile") | indent(8) }}
        {{ tile_of_number | indent(8) }}
        total = tl.zeros([64, 256], tl.float32, ACCUMULATOR)
        total, step = add_products(total, step, T, half, TAIL, xs, gs, full, empty, STAGES)
        product = total.to(DTYPE)
        wide = product.to(tl.float32)  # zero beyond d and p
        squares = tl.sum(tl.sum(wide * wide, 1), 0)
        tl.store(part_ptr + (row * B + b) * SLOTS + 2 * number + half, squares)
        tma.store_wait(0)  # the tile before has left
        products.index(half).reshape([64, 256]).store(product)
        fence_async_shared()
        sample = (slot * B + b).to(tl.int32)
{% for store in range(stores) %}
        if store == {{ store }}:
            tma.async_copy_shared_to_global(desc_{{ store }}, [sample, d + 64 * half, p], products.index(half))
{% endfor %}
    tma.store_wait(0)


@gluon.jit
def kernel(
    {{ arguments | indent(4) }}
):
    xs = tl.allocate_shared_memory(DTYPE, [2 * STAGES, 1, 64, 64], TILE)
    gs = tl.allocate_shared_memory(DTYPE, [STAGES, 1, 64, 256], TILE)
    products = tl.allocate_shared_memory(DTYPE, [2, 1, 64, 256], TILE)
    full, empty = ring(STAGES)
    {{ specialised(arguments, "xs, gs, products, full, empty") | indent(4) }}
"""


def prepare(
    chosen: Any,
    xs: list[Tensor],
    gs: list[Tensor],
    places: Sequence[tuple[int, int]],
    empty: Callable[[list[Tensor], list[Tensor], Sequence[int]], list[Tensor]],
) -> Callable[[list[Tensor], list[Tensor], Sequence[int]], list[Tensor]]:
    """Products and norms of layers with this geometry, by the kernel `chosen`; a layer's products go to its place (in
    which tensor of what `empty` gives, and where there)."""
    by_kind, B = several.kinds(xs, gs), xs[0].shape[0]
    common, total, slots = [], 0, 0
    for numbers in by_kind:
        x, g = xs[numbers[0]], gs[numbers[0]]
        d, p = cdiv(x.shape[2], hopper.STORED.rows), cdiv(g.shape[2], hopper.STORED.columns)
        sizes = B * d * p, x.shape[1], x.shape[2], g.shape[2], d, p
        common.append((*sizes, *x.stride()[:2], *g.stride()[:2]))
        total, slots = total + B * d * p * len(numbers), max(slots, 2 * d * p)
    launch = Launch(chosen, min(total, tuning.processors(xs[0].device)), **hopper.SETTINGS)

    def products(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> list[Tensor]:
        kept = empty(xs, gs, stores)
        part = xs[0].new_zeros((len(xs), B, slots), dtype=torch.float32)  # a small layer fills few of its slots
        own = [(x, g, row, slot, store) for row, (x, g, (store, slot)) in enumerate(zip(xs, gs, places, strict=True))]
        sizes = [value for t in kept for value in (t, t.shape[0] * B, t.shape[2], t.shape[3])]
        launch(part, *several.arguments(own, common, by_kind), *sizes, part, B, slots, total)
        return [*kept, part.sum(2)]

    return products
