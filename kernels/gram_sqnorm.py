"""Squared norms of per-sample weight gradients, by pairs of tokens. Nothing of size d x p or T x T is stored.

    out[b] = sum_l |x_b^T g_lb|_F^2 + bias_l |sum_t g_lbt|^2 = sum_{t,u} sum_l (x_t . x_u + bias_l) (g_lt . g_lu)

x [B, T, d], gs a list of [B, T, p_l] (linears that are fed by the same x: q, k, v), bias a list of bool -> [B]. The
sum over pairs cancels where tokens' gradients do; kernels/guard.py derives the guard against that: with r_t^2 = sum_l
(x_t . x_t + bias_l) (g_lt . g_lt) and R = sum_t r_t the result is max(est, (est + gamma R^2) / (1 + SLACK)^2), so
sqrt(out) (1 + SLACK) bounds the true norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, randn, start, widen
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.guard import floor, gamma, guarded
from flashdp_compile.kernels.operands import argument, layout, tiles_for
from flashdp_compile.kernels.tuning import Tiles


def reference(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Tensor:
    x, *gs = widen(x, *gs)
    width = sum(g.shape[2] for g in gs)
    x_floor, g_floor = floor(x.dtype, x.shape[2]), floor(x.dtype, width)
    token_gram = x @ x.mT
    est, squares = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[:2])
    for g, has_bias in zip(gs, bias, strict=True):
        est += ((token_gram + has_bias) * (g @ g.mT)).sum((1, 2))
        squares += (x.square().sum(-1) + x_floor + has_bias) * (g.square().sum(-1) + g_floor)
    return guarded(est, gamma(x.dtype, max(x.shape[2], width)) * squares.sqrt().sum(1).square())


def fake(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, *gs))


@dataclass(frozen=True)
class Spec:
    dot_type: str
    x: str  # layouts, see operands.py
    gs: tuple[str, ...]  # operands with a bias come first
    biased: int
    tiles: Tiles  # square


def specialise(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Spec:
    gs = _biased_first(gs, bias)
    tiles = tiles_for("gram_sqnorm", [x, *gs], 1, sum(g.shape[2] for g in gs))  # deep for long sums, for those of heads
    return Spec(dot_type(x, *gs), layout(x), tuple(map(layout, gs)), sum(bias), tiles)


# pairs(...): into += the Gram matrix of a block of rows with another. A block with itself is loaded once.
TEMPLATE = """
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
    {{ operand("x", x) }},
{% for how in gs %}
    {{ operand("g%d" % loop.index0, how) }}, p{{ loop.index0 }},
{% endfor %}
    part_ptr, root_ptr, T, D, x_floor, g_floor, PAIRS, BLOCKS,
):
    b = tl.program_id(0) // PAIRS
    pair = tl.program_id(0) % PAIRS
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
    tl.store(part_ptr + b.to(tl.int64) * PAIRS + pair, tl.where(i == j, total, 2.0 * total))
    if i == j:
        x_least, g_least = tl.full([], x_floor, tl.float32), tl.full([], g_floor, tl.float32)  # may come in float64
        rows = tl.arange(0, {{ tiles.rows }})
        diagonal = rows[:, None] == rows[None, :]
        square = (tl.sum(tl.where(diagonal, a, 0.0), 1) + x_least) * (tl.sum(tl.where(diagonal, g, 0.0), 1) + g_least)
{% if biased %}
        square += tl.sum(tl.where(diagonal, g_bias, 0.0), 1) + g_least
{% endif %}
        tl.store(root_ptr + b.to(tl.int64) * BLOCKS + i, tl.sum(tl.where(t + rows < T, tl.sqrt(square), 0.0)))
"""


def launch(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Tensor:
    B, T, D = x.shape
    width = sum(g.shape[2] for g in gs)
    spec = specialise(x, gs, bias)
    tiles = spec.tiles
    blocks = cdiv(T, tiles.rows)
    pairs = blocks * (blocks + 1) // 2
    if 0 in (B, T):
        return x.new_zeros(B, dtype=torch.float32)
    # every slot is written by one program, so empty is safe, and the sums are the same bits on every run
    part, root = (x.new_empty((B, n), dtype=torch.float32) for n in (pairs, blocks))
    loaded = list(argument(x, spec.x, tiles.rows, tiles.depth))
    for g, how in zip(_biased_first(gs, bias), spec.gs, strict=True):
        loaded += [*argument(g, how, tiles.rows, tiles.depth), g.shape[2]]
    floors = floor(torch.float32, D), floor(torch.float32, width)
    arguments = (*loaded, part, root, T, D, *floors, pairs, blocks)
    start(kernel(FAMILY, spec), B * pairs, x, *arguments, num_warps=tiles.warps, num_stages=tiles.stages)
    chain = max(cdiv(D, tiles.depth), sum(cdiv(g.shape[2], tiles.depth) for g in gs))
    return guarded(part.sum(1), gamma(torch.float32, chain) * root.sum(1).square())


def _biased_first(gs: list[Tensor], bias: list[bool]) -> list[Tensor]:
    return [g for g, b in zip(gs, bias, strict=True) if b] + [g for g, b in zip(gs, bias, strict=True) if not b]


def example(case, dtype, device, generator):
    B, T, d, *ps = case
    gs = [randn((B, T, p), dtype, device, generator) for p in ps]
    return randn((B, T, d), dtype, device, generator), gs, [n % 2 == 0 for n in range(len(ps))]


FAMILY = Family(
    name="gram_sqnorm",
    schema="(Tensor x, Tensor[] gs, bool[] bias) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    # B, T, d, p_0, p_1, ...
    cases=((3, 5, 7, 9), (2, 65, 63, 65, 3), (1, 1, 1, 1), (4, 130, 16, 8, 33, 1), (0, 4, 3, 2), (2, 0, 3, 2)),
    example=example,
)
