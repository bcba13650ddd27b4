"""Squared norms of per-sample weight gradients, by tiles of the product, which is never stored.

    out[b] = |x_b^T g_b|_F^2          x [B, T, d], g [B, T, p] -> [B]

Entries are summed over t before they are squared, so the result is the norm of the product as rounded to float32, to
a few units in the last place. `weighted_matmul` forms every entry in the same order (the same blocks over t), so the
product that it scales is the one measured here, bit for bit, even where the tokens' gradients cancel. Keep their
blocks equal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, inner, pointer, randn, sample_products, start
from flashdp_compile.kernels.family import Family


def reference(x: Tensor, g: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], dtype=accumulator(x, g))
    for run, products in sample_products(x, g):
        out[run] = products.square().sum((1, 2))
    return out


def fake(x: Tensor, g: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, g))


@dataclass(frozen=True)
class Spec:
    dot_type: str
    x_inner: bool
    g_inner: bool
    store: str = ""  # Triton's dtype of the stored product; outer_store renders this template with one
    block_d: int = 64
    block_p: int = 64
    block_t: int = 32


def specialise(x: Tensor, g: Tensor) -> Spec:
    return Spec(dot_type(x, g), inner(x), inner(g))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    {{ args("x", 3, x_inner) }},
    {{ args("g", 3, g_inner) }},
    {% if store %}out_ptr, {% endif %}part_ptr, T, D, P, TILES, TILES_P,
):
    b = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    d = (tile // TILES_P) * {{ block_d }} + tl.arange(0, {{ block_d }})
    p = (tile % TILES_P) * {{ block_p }} + tl.arange(0, {{ block_p }})
    acc = tl.zeros([{{ block_d }}, {{ block_p }}], tl.float32)
    for first in range(0, T, {{ block_t }}):
        t = first + tl.arange(0, {{ block_t }})
        inside_x, inside_g = (t[:, None] < T) & (d[None, :] < D), (t[:, None] < T) & (p[None, :] < P)
        p_x = {{ at("x", "b", "t[:, None]", "d[None, :]", x_inner) }}
        b_x = tl.load(p_x, mask=inside_x, other=0.0).to({{ dot_type }})
        p_g = {{ at("g", "b", "t[:, None]", "p[None, :]", g_inner) }}
        b_g = tl.load(p_g, mask=inside_g, other=0.0).to({{ dot_type }})
        acc = {{ dot("tl.trans(b_x)", "b_g", "acc") }}
{% if store %}
    stored = acc.to({{ store }})
    p_out = out_ptr + (b * D + d[:, None].to(tl.int64)) * P + p[None, :]
    tl.store(p_out, stored, mask=(d[:, None] < D) & (p[None, :] < P))
    acc = stored.to(tl.float32)
{% endif %}
    tl.store(part_ptr + b * TILES + tile, tl.sum(acc * acc))
"""


def launch(x: Tensor, g: Tensor) -> Tensor:
    (B, T, D), P = x.shape, g.shape[2]
    spec = specialise(x, g)
    tiles_p = cdiv(P, spec.block_p)
    tiles = cdiv(D, spec.block_d) * tiles_p
    part = x.new_empty((B, tiles), dtype=torch.float32)  # one slot per program: all are written, no atomics
    start(kernel(FAMILY, spec), B * tiles, x, *pointer(x), *pointer(g), part, T, D, P, tiles, tiles_p)
    return part.sum(1)


def example(case, dtype, device, generator):
    B, T, d, p = case
    return randn((B, T, d), dtype, device, generator), randn((B, T, p), dtype, device, generator)


# B, T, d, p
CASES = ((3, 5, 7, 9), (2, 65, 63, 65), (1, 1, 1, 1), (3, 3, 130, 1), (0, 4, 3, 2), (2, 0, 3, 2))

FAMILY = Family(
    name="outer_sqnorm",
    schema="(Tensor x, Tensor g) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=CASES,
    example=example,
)
