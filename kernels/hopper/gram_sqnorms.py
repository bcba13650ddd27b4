"""The template of gram_sqnorms in Gluon; the arithmetic is that of its Triton template, in the same order.

`prepare` does once what is the same at every step: see `Family.run`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import hopper, several, tuning
from flashdp_compile.kernels.common import Launch, cdiv
from flashdp_compile.kernels.guard import gamma, guarding

# Programs take pairs of blocks of 128 tokens, about as many apart as there are programs: those of one sample at one
# time, so that blocks come from the L2 cache. The loading warp makes descriptors for each layer, in one of two places
# in turn. A group has 64 of the 128 rows of both Gram matrices; of a block with itself, the one that has the upper rows
# computes the left half alone, since the rest is symmetric. It multiplies a block of features from zero and adds it in
# float32, while the other multiplies: tensor cores would truncate.
TEMPLATE = """
{%- set operands, ends, pointers, strides = ["x"], ["D"], [], [] -%}
{%- for how in gs -%}
{%- set _ = operands.append("g%d" % loop.index0) -%}
{%- set _ = ends.append("p%d" % loop.index0) -%}
{%- endfor -%}
{%- for name in operands -%}
{%- set _ = pointers.append(name ~ "_ptr") -%}
{%- set _ = strides.extend([name ~ "_s0", name ~ "_s1"]) -%}
{%- endfor -%}
{%- set arguments = parameters(pointers, ["row"], ["PROGRAMS"] + ends, strides, kinds)
    ~ "part_ptr, root_ptr, B, T, PAIRS, BLOCKS, PAIRS_OF_ALL," -%}
{%- macro layer_of(pair) -%}
{{ selected(pair, pointers, ["row"], ["PROGRAMS"] + ends, strides, kinds) }}
{%- endmacro -%}
{%- set of_pair = "step, b, i, j, number, row, " ~ (ends | join(", "))
    ~ ", part_ptr, root_ptr, B, T, PAIRS, BLOCKS, blocks, full, empty" -%}
{%- set pair_of_number -%}
b = number // PAIRS
i, j = pair_of(number % PAIRS)
{%- endset -%}
from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashdp_compile.kernels.hopper.parts import NARROW_PAIR, PAIR, TILE, claim, landed, leave, loaded, next_pair
from flashdp_compile.kernels.hopper.parts import pair_of, ring

STAGES = tl.constexpr({{ tiles.stages }})
DEPTH = tl.constexpr({{ tiles.depth }})
DTYPE = tl.constexpr({{ dot_type }})


@gluon.jit
def load_blocks(desc, width, b, i, j, step, blocks, full, empty):
    for k in range(0, width, DEPTH):
        stage, ready = claim(step, full, empty, STAGES)
        mbarrier.expect(ready, 128 * DEPTH * 2, pred=i == j)
        mbarrier.expect(ready, 2 * 128 * DEPTH * 2, pred=i != j)
        tma.async_copy_global_to_shared(desc, [b, 128 * i, k], ready, blocks.index(2 * stage))
        tma.async_copy_global_to_shared(desc, [b, 128 * j, k], ready, blocks.index(2 * stage + 1), pred=i != j)
        step += 1
    return step


@gluon.jit
def load_layer(
    pair, step,
    {{ arguments | indent(4) }}
    blocks, full, empty,
):
    {{ layer_of("pair") | indent(4) }}
{% for name in operands %}
    {{ name }}_desc = tma.make_tensor_descriptor(
        {{ name }}_ptr, [B, T, {{ ends[loop.index0] }}], [{{ name }}_s0, {{ name }}_s1, 1], [1, 128, DEPTH], TILE
    )
{% endfor %}
    while number < PROGRAMS:
        {{ pair_of_number | indent(8) }}
{% for name in operands %}
        step = load_blocks({{ name }}_desc, {{ ends[loop.index0] }}, b, i, j, step, blocks, full, empty)
{% endfor %}
        following = next_pair(pair)
        number, pair = number + following - pair, following
    return pair, step


{{ load_in_turn("load_layer", "pair", "PAIRS_OF_ALL", arguments, "blocks, full, empty") }}


@gluon.jit
def add_products(
    gram, width, other, half: tl.constexpr, columns: tl.constexpr, layout: tl.constexpr, step, blocks, full, empty
):
    for k in range(0, width, DEPTH):
        stage = loaded(step, full, STAGES)
        b_t = blocks.index(2 * stage).reshape([128, DEPTH]).slice(64 * half, 64, dim=0)
        b_u = blocks.index(2 * stage + other).reshape([128, DEPTH]).slice(0, columns, dim=0).permute((1, 0))
        fresh = tl.zeros([64, columns], tl.float32, layout)
        fresh = warpgroup_mma(b_t, b_u, fresh, use_acc=False, is_async=True)
        fresh = warpgroup_mma_wait(0, deps=[fresh])
        leave(step, empty, STAGES)
        gram += fresh
        step += 1
    return gram, step


@gluon.jit
def sum_of(products, twice):
    return tl.sum(tl.sum(tl.where(twice, 2.0 * products, products), 1), 0)


@gluon.jit
def multiply_half(
    half: tl.constexpr, columns: tl.constexpr, layout: tl.constexpr,
    {{ of_pair }},
):
    rows = 64 * half + tl.arange(0, 64, tl.SliceLayout(1, layout))
    u = tl.arange(0, columns, tl.SliceLayout(0, layout))[None, :]
    diagonal = rows[:, None] == u
    twice = u < tl.where(i == j, 64 * half, columns)  # pairs (t, u) for which nobody computes (u, t)
    other = tl.where(i == j, 0, 1)
    a = tl.zeros([64, columns], tl.float32, layout)  # x_t . x_u
    a, step = add_products(a, D, other, half, columns, layout, step, blocks, full, empty)
    g = tl.zeros([64, columns], tl.float32, layout)  # sum_l g_lt . g_lu
{% for how in gs %}
    g, step = add_products(g, p{{ loop.index0 }}, other, half, columns, layout, step, blocks, full, empty)
{% if loop.index == biased %}
    of_biased, squares_of_biased = sum_of(g, twice), tl.sum(tl.where(diagonal, g, 0.0), 1)
{% endif %}
{% endfor %}
    total = sum_of(a * g, twice){{ " + of_biased" if biased }}
    tl.store(part_ptr + (row * B * PAIRS + number) * 2 + half, total)
    if i == j:
        x_least = tl.to_tensor(D).to(tl.float32) * {{ floor }}
        g_least = tl.to_tensor({{ ends[1:] | join(" + ") }}).to(tl.float32) * {{ floor }}
        squares = tl.sum(tl.where(diagonal, a, 0.0), 1) + x_least
        squares *= tl.sum(tl.where(diagonal, g, 0.0), 1) + g_least
{% if biased %}
        squares += squares_of_biased + g_least
{% endif %}
        root = tl.sum(tl.where(128 * i + rows < T, tl.sqrt(squares), 0.0), 0)
        tl.store(root_ptr + ((row * B + b) * BLOCKS + i) * 2 + half, root)
    return step


@gluon.jit
def multiply(
    half: tl.constexpr,
    {{ arguments | indent(4) }}
    blocks, full, empty,
):
    step = tl.to_tensor(0)
    pair = tl.program_id(0)
    while pair < PAIRS_OF_ALL:
        {{ layer_of("pair") | indent(8) }}
        {{ pair_of_number | indent(8) }}
        if half == 0:
            if i == j:  # the other half has the columns on the right, transposed
                step = multiply_half(half, 64, NARROW_PAIR, {{ of_pair }})
            else:
                step = multiply_half(half, 128, PAIR, {{ of_pair }})
        else:
            step = multiply_half(half, 128, PAIR, {{ of_pair }})
        pair = next_pair(pair)


@gluon.jit
def kernel(
    {{ arguments | indent(4) }}
):
    blocks = tl.allocate_shared_memory(DTYPE, [2 * STAGES, 1, 128, DEPTH], TILE)
    full, empty = ring(STAGES)
    {{ specialised(arguments, "blocks, full, empty") | indent(4) }}
"""


def prepare(chosen: Any, layers: list[list[Tensor]]) -> Callable[[list[list[Tensor]]], Tensor]:
    """Norms of layers with this geometry, [layers, B], by the kernel `chosen`; a layer is x and its gs, in the order of
    the kernel."""
    (B, T, _), depth = layers[0][0].shape, hopper.PAIRS.depth
    by_kind = several.kinds(*map(list, zip(*layers, strict=True)))
    blocks = cdiv(T, hopper.PAIRS.rows)
    pairs = blocks * (blocks + 1) // 2
    common = [
        (B * pairs, *(t.shape[2] for t in first), *(step for t in first for step in t.stride()[:2]))
        for first in (layers[numbers[0]] for numbers in by_kind)
    ]
    programs = len(layers) * B * pairs
    launch = Launch(chosen, min(programs, tuning.processors(layers[0][0].device)), **hopper.SETTINGS)
    widths = [[cdiv(t.shape[2], depth) for t in layer] for layer in layers]
    guarded = guarding(len(layers) * B, gamma(torch.float32, max(max(x, sum(gs)) for x, *gs in widths)))

    def norms(layers: list[list[Tensor]]) -> Tensor:
        # every slot is written by one group, so empty is safe, and the sums are the same bits on every run
        part, root = (layers[0][0].new_empty((len(layers), B, 2 * n), dtype=torch.float32) for n in (pairs, blocks))
        own = [(*layer, row) for row, layer in enumerate(layers)]
        arguments = several.arguments(own, common, by_kind)
        launch(part, *arguments, part, root, B, T, pairs, blocks, programs)
        return guarded(part, root)

    return norms
