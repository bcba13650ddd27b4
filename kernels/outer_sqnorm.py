"""Squared norms of per-sample weight gradients, by tiles of the product, which is never stored.

    out[b] = |x_b^T g_b|_F^2          x [B, T, d], g [B, T, p] -> [B]

Entries are summed over t before they are squared, so the result is the norm of the product as rounded to float32, to
a few units in the last place. `weighted_matmul` forms every entry in the same order (in blocks of the same depth), so
the product that it scales is the one measured here, bit for bit, even where the tokens' gradients
cancel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels import tuning
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, randn, sample_products, start
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.operands import argument, layout, tiles_for
from flashdp_compile.kernels.tuning import Tiles


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
    x: str  # layouts, see operands.py
    g: str
    tiles: Tiles
    store: str = ""  # Triton's dtype of the stored product; outer_store renders this template with one
    out: str = ""  # and its layout
    halves: int = 1  # in which a descriptor stores a wide tile


def specialise(x: Tensor, g: Tensor) -> Spec:
    tiles = tiles_for("outer_sqnorm", [x, g], (x.shape[2], g.shape[2]))
    if isinstance(x.shape[1], int):
        tiles = tuning.for_tokens(tiles, x.shape[1])
    return Spec(dot_type(x, g), layout(x), layout(g), tiles)


# Persistent: each program takes tiles PROGRAMS apart, so that loads of the next tile overlap with the end of this one.
# Tiles go in groups of 8 rows, for which the other operand stays in the L2 cache. A tile is stored in two halves: one
# of 256 columns fits as a whole and took 4 percent longer on an H100; of those of 128 columns two programs then fit on
# a multiprocessor, which hide each other's stores.
TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    {{ operand("x", x) }}, {{ operand("g", g) }},
    {% if store %}{{ "out_desc" if out == "tma" else "out_ptr" }}, {% endif %}part_ptr,
    T, D, P, TILES_D, TILES_P, COUNT, PROGRAMS,
):
    for number in tl.range(tl.program_id(0), COUNT, PROGRAMS, flatten=True):
        b = number // (TILES_D * TILES_P)
        {{ swizzled("number % (TILES_D * TILES_P)", tiles) | indent(8) }}
        acc = tl.zeros([{{ tiles.rows }}, {{ tiles.columns }}], tl.float32)
        for t in range(0, T, {{ tiles.depth }}):
            b_x = {{ tile("x", x, "b", "t", tiles.depth, "T", "d", tiles.rows, "D") }}.to({{ dot_type }})
            b_g = {{ tile("g", g, "b", "t", tiles.depth, "T", "p", tiles.columns, "P") }}.to({{ dot_type }})
            acc = {{ dot("tl.trans(b_x)", "b_g", "acc") }}
{% if store %}
        stored = acc.to({{ store }})
{% if out == "tma" and halves == 2 %}
{% set half = tiles.columns // 2 %}
        left, right = tl.split(tl.permute(stored.reshape({{ tiles.rows }}, 2, {{ half }}), (0, 2, 1)))
        out_desc.store([b, d, p], left.reshape(1, {{ tiles.rows }}, {{ half }}))
        out_desc.store([b, d, p + {{ half }}], right.reshape(1, {{ tiles.rows }}, {{ half }}))
{% elif out == "tma" %}
        out_desc.store([b, d, p], stored.reshape(1, {{ tiles.rows }}, {{ tiles.columns }}))
{% else %}
        {{ store_tile("out", "b", "stored", tiles) }}
{% endif %}
        acc = stored.to(tl.float32)
{% endif %}
        tl.store(part_ptr + number, tl.sum(acc * acc))
"""


def launch(x: Tensor, g: Tensor) -> Tensor:
    return run(FAMILY, specialise(x, g), x, g)


def run(family: Family, spec: Spec, x: Tensor, g: Tensor, *out: Tensor) -> Tensor:
    """Starts the template on x and g, and on where to store the product if `spec` says so; gives the squared norms."""
    (B, T, D), P = x.shape, g.shape[2]
    tiles = spec.tiles
    count = cdiv(D, tiles.rows), cdiv(P, tiles.columns)
    if 0 in (B, T, *count):
        for product in out:
            product.zero_()
        return x.new_zeros(B, dtype=torch.float32)
    part = x.new_empty((B, count[0] * count[1]), dtype=torch.float32)  # one slot per tile: all are written, no atomics
    loaded = (
        *argument(x, spec.x, tiles.depth, tiles.rows),
        *argument(g, spec.g, tiles.depth, tiles.columns),
        *(argument(t, spec.out, tiles.rows, tiles.columns // spec.halves)[0] for t in out),
    )
    programs = min(part.numel(), tuning.room(tiles, x.device))
    arguments = (*loaded, part, T, D, P, *count, part.numel(), programs)
    start(kernel(family, spec), programs, x, *arguments, num_warps=tiles.warps, num_stages=tiles.stages)
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
    tiled=True,
)
