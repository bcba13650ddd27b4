"""Per-sample weight gradients, stored in the activations' dtype, and the squared norms of what was stored.

    product[b] = round(x_b^T g_b), sqnorm[b] = |product[b]|_F^2          x [B, T, d], g [B, T, p] -> [B, d, p] like x,
    [B]

The norm is taken after rounding: the clipped sum reads the stored values, so theirs is the norm that must be bounded.
"""

from dataclasses import replace

import torch
from torch import Tensor

from flashdp_compile.kernels import outer_sqnorm
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import TRITON_NAMES, accumulator, cdiv, pointer, start, widen
from flashdp_compile.kernels.family import Family


def reference(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    wide_x, wide_g = widen(x, g)
    product = (wide_x.mT @ wide_g).to(x.dtype).contiguous()
    return product, product.to(wide_x.dtype).square().sum((1, 2))


def fake(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    product = x.new_empty((x.shape[0], x.shape[2], g.shape[2]))
    return product, x.new_empty(x.shape[0], dtype=accumulator(x, g))


def specialise(x: Tensor, g: Tensor) -> outer_sqnorm.Spec:
    return replace(outer_sqnorm.specialise(x, g), store=TRITON_NAMES[x.dtype])


def launch(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    (B, T, D), P = x.shape, g.shape[2]
    spec = specialise(x, g)
    tiles_p = cdiv(P, spec.block_p)
    tiles = cdiv(D, spec.block_d) * tiles_p
    product = x.new_empty((B, D, P))
    part = x.new_empty((B, tiles), dtype=torch.float32)
    start(kernel(FAMILY, spec), B * tiles, x, *pointer(x), *pointer(g), product, part, T, D, P, tiles, tiles_p)
    return product, part.sum(1)


FAMILY = Family(
    name="outer_store",
    schema="(Tensor x, Tensor g) -> (Tensor, Tensor)",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=outer_sqnorm.TEMPLATE,
    cases=outer_sqnorm.CASES,
    example=outer_sqnorm.example,
)
