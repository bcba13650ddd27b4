"""Per-sample weight gradients, stored in the activations' dtype, and the squared norms of what was stored.

    product[b] = round(x_b^T g_b), sqnorm[b] = |product[b]|_F^2          x [B, T, d], g [B, T, p] -> [B, d, p] like x,
    [B]

The norm is taken after rounding: the clipped sum reads the stored values, so theirs is the norm that must be bounded.
"""

from dataclasses import replace

from torch import Tensor

from flashdp_compile.kernels import outer_sqnorm, tuning
from flashdp_compile.kernels.common import TRITON_NAMES, accumulator, widen
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.operands import INNER, TMA, tiles_for


def reference(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    wide_x, wide_g = widen(x, g)
    product = (wide_x.mT @ wide_g).to(x.dtype).contiguous()
    return product, product.to(wide_x.dtype).square().sum((1, 2))


def fake(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    product = x.new_empty((x.shape[0], x.shape[2], g.shape[2]))
    return product, x.new_empty(x.shape[0], dtype=accumulator(x, g))


def specialise(x: Tensor, g: Tensor) -> outer_sqnorm.Spec:
    # the product is fresh memory with rows of p elements
    whole_rows = g.shape[2] * x.element_size() % 16 == 0
    out = TMA if x.element_size() == 2 and whole_rows and tuning.has_tma(x.device) else INNER
    tiles = tiles_for("outer_store" if out == TMA else "outer_store by pointers", [x, g], (x.shape[2], g.shape[2]))
    spec = replace(outer_sqnorm.specialise(x, g), tiles=tiles, store=TRITON_NAMES[x.dtype], out=out)
    return replace(spec, halves=2 if tiles.columns > 64 else 1)


def launch(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    product = x.new_empty((x.shape[0], x.shape[2], g.shape[2]))
    return product, outer_sqnorm.run(FAMILY, specialise(x, g), x, g, product)


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
    tiled=True,
)
