"""Squared norms of per-sample weight gradients of several layers, by pairs of tokens, in one launch.

    out[i, b] = sum_l |x_ib^T g_ilb|_F^2 + bias_l |sum_t g_ilbt|^2
              = sum_{t,u} sum_l (x_ibt . x_ibu + bias_l) (g_ilbt . g_ilbu)

xs a list of x_i [B, T, d_i]; gs a list of g_il [B, T, p_il], those of x_0 first (linears that are fed by the same x: q,
k, v), as many for each x as `bias`, a list of bool -> [layers, B]. Nothing of size d x p or T x T is stored. The sum
over pairs cancels where tokens' gradients do; kernels/guard.py derives the guard against that: with r_t^2 = sum_l
(x_t . x_t + bias_l) (g_lt . g_lt) and R = sum_t r_t the result is max(est, (est + gamma R^2) / (1 + SLACK)^2), so
sqrt(out) (1 + SLACK) bounds the true norm.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import hopper, several
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, randn, start, widen
from flashdp_compile.kernels.family import Family, supported
from flashdp_compile.kernels.guard import floor, gamma, guarded, guarding
from flashdp_compile.kernels.hopper import gram_sqnorms as warp_specialised
from flashdp_compile.kernels.operands import layout, sources, strides, tiles_for
from flashdp_compile.kernels.tuning import Tiles


def reference(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> Tensor:
    return torch.stack([_reference(x, own, bias) for x, own in _layers(xs, gs, bias)])


def _reference(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Tensor:
    x, *gs = widen(x, *gs)
    width = sum(g.shape[2] for g in gs)
    x_floor, g_floor = floor(x.dtype, x.shape[2]), floor(x.dtype, width)
    token_gram = x @ x.mT
    est, squares = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[:2])
    for g, has_bias in zip(gs, bias, strict=True):
        est += ((token_gram + has_bias) * (g @ g.mT)).sum((1, 2))
        squares += (x.square().sum(-1) + x_floor + has_bias) * (g.square().sum(-1) + g_floor)
    return guarded(est, gamma(x.dtype, max(x.shape[2], width)) * squares.sqrt().sum(1).square())


def fake(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> Tensor:
    return xs[0].new_empty((len(xs), xs[0].shape[0]), dtype=accumulator(*xs, *gs))


def _layers(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(x, its gs), layer by layer."""
    for number, x in enumerate(xs):
        yield x, gs[number * len(bias) : (number + 1) * len(bias)]


@dataclass(frozen=True)
class Spec:
    dot_type: str
    x: str  # layouts, see operands.py
    gs: tuple[str, ...]  # operands with a bias come first
    biased: int
    tiles: Tiles  # square
    kinds: tuple[int, ...]  # how many layers are of each
    hopper: bool  # whether by hopper.gram_sqnorms
    floor: float = floor(torch.float32, 1)


def specialise(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> Spec:
    """Settings for layers of which all have the layouts of the first."""
    x, own = next(_layers(xs, gs, bias))
    own = _biased_first(own, bias)
    if on_hopper := hopper.can_load([*xs, *gs]):
        tiles = hopper.PAIRS
    else:
        width = max(sum(g.shape[2] for g in each) for _, each in _layers(xs, gs, bias))
        tiles = tiles_for("gram_sqnorm", [x, *own], (1, width))  # deep for long sums, for those of heads
    kinds = tuple(map(len, several.kinds(xs, *_columns(gs, bias))))
    return Spec(dot_type(x, *own), layout(x), tuple(map(layout, own)), sum(bias), tiles, kinds, on_hopper)


def _columns(gs: list[Tensor], bias: list[bool]) -> list[list[Tensor]]:
    return [gs[number :: len(bias)] for number in range(len(bias))]


# Programs [layers, samples, pairs]. pairs(...): into += the Gram matrix of a block of rows with another. A block with
# itself is loaded once.
TRITON = """
{%- set pointers = [source("x", x, kinds)] -%}
{%- set sizes = ["PROGRAMS", "D"] -%}
{%- set strides = ["x_s0", "x_s1"] + (["x_s2"] if x == "strided" else []) -%}
{%- for how in gs -%}
{%- set g = "g%d" % loop.index0 -%}
{%- set _ = pointers.append(source(g, how, kinds)) -%}
{%- set _ = sizes.append("p%d" % loop.index0) -%}
{%- set _ = strides.extend([g ~ "_s0", g ~ "_s1"] + ([g ~ "_s2"] if how == "strided" else [])) -%}
{%- endfor -%}
{%- macro pairs(into, name, how, end) -%}
if i == j:
        for k in range(0, {{ end }}, {{ tiles.depth }}):
            b_t = {{ tile(name, how, "b", "t", tiles.rows, "T", "k", tiles.depth, end) }}.to({{ dot_type }})
            {{ into }} += {{ fresh_dot("b_t", "tl.trans(b_t)", tiles.depth) }}
    else:
        for k in range(0, {{ end }}, {{ tiles.depth }}):
            b_t = {{ tile(name, how, "b", "t", tiles.rows, "T", "k", tiles.depth, end) }}.to({{ dot_type }})
            b_u = {{ tile(name, how, "b", "u", tiles.rows, "T", "k", tiles.depth, end) }}.to({{ dot_type }})
            {{ into }} += {{ fresh_dot("b_t", "tl.trans(b_u)", tiles.depth) }}
{%- endmacro -%}
import triton
import triton.language as tl


@triton.jit
def kernel(
    {{ parameters(pointers, ["row"], sizes, strides, kinds) | indent(4) -}}
{{ "    " }}part_ptr, root_ptr, B, T, PAIRS, BLOCKS,
):
    {{ selected("tl.program_id(0)", pointers, ["row"], sizes, strides, kinds) | indent(4) }}
    {{ described("x", x, "B", "T", "D", tiles.rows, tiles.depth, kinds) | indent(4) }}
{% for how in gs %}
    {{ described("g%d" % loop.index0, how, "B", "T", "p%d" % loop.index0, tiles.rows, tiles.depth, kinds)
        | indent(4) }}
{% endfor %}
    b = number // PAIRS
    pair = number % PAIRS
    # pair = i (i + 1) / 2 + j with j <= i; the root in float32 may be off by one
    i = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > pair, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= pair, i + 1, i)
    j = pair - i * (i + 1) // 2
    t = i * {{ tiles.rows }}
    u = j * {{ tiles.rows }}

    a = tl.zeros([{{ tiles.rows }}, {{ tiles.rows }}], tl.float32)  # x_t . x_u
    {{ pairs("a", "x", x, "D") }}

    g = tl.zeros([{{ tiles.rows }}, {{ tiles.rows }}], tl.float32)  # sum_l g_lt . g_lu
{% for how in gs %}
{% set n, name, end = loop.index0, "g%d" % loop.index0, "p%d" % loop.index0 %}
{% if n == biased and biased > 0 %}
    g_bias = g  # the operands up to here have a bias
{% endif %}
    {{ pairs("g", name, how, end) }}
{% endfor %}
{% if biased == gs | length %}
    g_bias = g
{% endif %}

    total = tl.sum(a * g{% if biased %} + g_bias{% endif %})
    tl.store(part_ptr + (row * B + b) * PAIRS + pair, tl.where(i == j, total, 2.0 * total))
    if i == j:
        x_least = tl.full([], D, tl.float32) * {{ floor }}
        g_least = tl.full([], {{ sizes[2:] | join(" + ") }}, tl.float32) * {{ floor }}
        rows = tl.arange(0, {{ tiles.rows }})
        diagonal = rows[:, None] == rows[None, :]
        square = (tl.sum(tl.where(diagonal, a, 0.0), 1) + x_least) * (tl.sum(tl.where(diagonal, g, 0.0), 1) + g_least)
{% if biased %}
        square += tl.sum(tl.where(diagonal, g_bias, 0.0), 1) + g_least
{% endif %}
        tl.store(root_ptr + (row * B + b) * BLOCKS + i, tl.sum(tl.where(t + rows < T, tl.sqrt(square), 0.0)))
"""
TEMPLATE = hopper.either(warp_specialised.TEMPLATE, TRITON)


def launch(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> Tensor:
    """Layers of which all have the layouts of the first, as many samples, and as many tokens."""
    B, T, _ = xs[0].shape
    if 0 in (B, T):
        return xs[0].new_zeros((len(xs), B), dtype=torch.float32)
    spec = specialise(xs, gs, bias)
    if spec.hopper:
        return prepare(xs, gs, bias)(xs, gs, bias)
    tiles, by_kind = spec.tiles, several.kinds(xs, *_columns(gs, bias))
    blocks = cdiv(T, tiles.rows)
    pairs = blocks * (blocks + 1) // 2
    # every slot is written by one program, so empty is safe, and the sums are the same bits on every run
    part, root = (xs[0].new_empty((len(xs), B, n), dtype=torch.float32) for n in (pairs, blocks))
    layers = [(x, _biased_first(own, bias)) for x, own in _layers(xs, gs, bias)]
    own: list[tuple[Any, ...]] = [(x, *its, row) for row, (x, its) in enumerate(layers)]
    if len(layers) == 1:
        layouts = zip(own[0][:-1], (spec.x, *spec.gs), strict=True)
        own = [(*(s for t, how in layouts for s in sources([t], how, tiles.rows, tiles.depth)), 0)]
    common = []
    for x, its in (layers[numbers[0]] for numbers in by_kind):
        steps = [s for t, how in zip((x, *its), (spec.x, *spec.gs), strict=True) for s in strides(t, how)]
        common.append((B * pairs, x.shape[2], *(g.shape[2] for g in its), *steps))
    arguments = (*several.arguments(own, common, by_kind), part, root, B, T, pairs, blocks)
    programs = len(xs) * B * pairs
    start(kernel(FAMILY, spec), programs, xs[0], *arguments, num_warps=tiles.warps, num_stages=tiles.stages)
    chain = max(
        max(cdiv(x.shape[2], tiles.depth), sum(cdiv(g.shape[2], tiles.depth) for g in its)) for x, its in layers
    )
    return guarding(len(xs) * B, gamma(torch.float32, chain))(part, root)


def prepare(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> Callable[..., Tensor]:
    norms = warp_specialised.prepare(kernel(FAMILY, specialise(xs, gs, bias)), _ordered(xs, gs, bias))
    return lambda xs, gs, bias: norms(_ordered(xs, gs, bias))


def _ordered(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> list[list[Tensor]]:
    """x and its gs, layer by layer, those with a bias first."""
    return [[x, *_biased_first(its, bias)] for x, its in _layers(xs, gs, bias)]


def stays_op(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> bool:
    return hopper.can_load([*xs, *gs])


def supports(xs: list[Tensor], gs: list[Tensor], bias: list[bool]) -> bool:
    layers = [(layout(x), *map(layout, _biased_first(its, bias))) for x, its in _layers(xs, gs, bias)]
    return supported(*xs, *gs) and len(set(layers)) == 1 and len({x.shape[:2] for x in xs}) == 1


def _biased_first(gs: list[Tensor], bias: list[bool]) -> list[Tensor]:
    return [g for g, b in zip(gs, bias, strict=True) if b] + [g for g, b in zip(gs, bias, strict=True) if not b]


def example(case, dtype, device, generator):
    B, T, count, *widths = case  # count: operands of a layer, x and its gs
    layers = [
        [randn((B, T, n), dtype, device, generator) for n in widths[first : first + count]]
        for first in range(0, len(widths), count)
    ]
    return [x for x, *_ in layers], [g for _, *its in layers for g in its], [n % 2 == 0 for n in range(count - 1)]


FAMILY = Family(
    name="gram_sqnorms",
    schema="(Tensor[] xs, Tensor[] gs, bool[] bias) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    # B, T, operands of a layer, d_0, p_00, ..., d_1, p_10, ...
    cases=(
        (3, 5, 2, 7, 9, 7, 9),
        (2, 65, 3, 63, 65, 3, 8, 9, 16, 63, 65, 3),
        (1, 1, 2, 1, 1),
        (11, 70, 2, *3 * (3, 4)),
        (0, 4, 2, 3, 2, 1, 1),
    ),
    example=example,
    supports=supports,
    stays_op=stays_op,
    prepare=prepare,
)
