"""Cross term of the norm of a table that is used twice, as embedding and as output head, whose product is stored.

    out[b] = sum_t ge_bt . product[b, ids_bt] = <gradient through the embedding, gradient through the head>

ids [B, T] int64, ge [B, T, d] gradient of the embedding's output, product [B, V, d] the head's gradients of all samples
-> [B]. It is that of the stored product, as its norm is. Positions with a negative id are excluded and their ge is not
read; other ids must be below V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, inner, pointer, randn, random_ids, start, widen
from flashdp_compile.kernels.family import Family


def reference(ids: Tensor, ge: Tensor, product: Tensor) -> Tensor:
    ge, product = widen(ge, product)
    rows = product.gather(1, ids.clamp_min(0)[:, :, None].expand(-1, -1, product.shape[2]))
    return torch.where(ids[:, :, None] >= 0, ge * rows, 0).sum((1, 2))


def fake(ids: Tensor, ge: Tensor, product: Tensor) -> Tensor:
    return ge.new_empty(ge.shape[0], dtype=accumulator(ge, product))


@dataclass(frozen=True)
class Spec:
    ge_inner: bool
    product_inner: bool
    block_t: int = 16
    block_k: int = 128


def specialise(ids: Tensor, ge: Tensor, product: Tensor) -> Spec:
    return Spec(inner(ge), inner(product))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    ids_ptr, ids_s0, ids_s1,
    {{ args("ge", 3, ge_inner) }},
    {{ args("product", 3, product_inner) }},
    part_ptr, T, D, V, TILES,
):
    b = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    t = tile * {{ block_t }} + tl.arange(0, {{ block_t }})
    ids = tl.load(ids_ptr + b * ids_s0 + t.to(tl.int64) * ids_s1, mask=t < T, other=-1)
    used = (ids >= 0) & (ids < V)
    acc = tl.zeros([{{ block_t }}, {{ block_k }}], tl.float32)
    for first in range(0, D, {{ block_k }}):
        k = first + tl.arange(0, {{ block_k }})
        inside = used[:, None] & (k[None, :] < D)
        b_ge = tl.load({{ at("ge", "b", "t[:, None]", "k[None, :]", ge_inner) }}, mask=inside, other=0.0)
        row = tl.load({{ at("product", "b", "ids[:, None]", "k[None, :]", product_inner) }}, mask=inside, other=0.0)
        acc += b_ge.to(tl.float32) * row.to(tl.float32)
    tl.store(part_ptr + b * TILES + tile, tl.sum(acc))
"""


def launch(ids: Tensor, ge: Tensor, product: Tensor) -> Tensor:
    B, T, D = ge.shape
    spec = specialise(ids, ge, product)
    tiles = cdiv(T, spec.block_t)
    part = ge.new_empty((B, tiles), dtype=torch.float32)
    operands = (ids, *ids.stride(), *pointer(ge), *pointer(product))
    start(kernel(FAMILY, spec), B * tiles, ge, *operands, part, T, D, product.shape[1], tiles)
    return part.sum(1)


def example(case, dtype, device, generator):
    B, T, d, V = case
    ids = random_ids((B, T), V, device, generator)
    return ids, *(randn(shape, dtype, device, generator) for shape in ((B, T, d), (B, V, d)))


FAMILY = Family(
    name="stored_cross",
    schema="(Tensor ids, Tensor ge, Tensor product) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    # B, T, d, V
    cases=((3, 5, 7, 9), (2, 65, 133, 65), (1, 1, 1, 1), (2, 3, 1, 7), (0, 4, 3, 2), (2, 0, 4, 2)),
    example=example,
)
