"""Clipped gradient of an embedding table.

    out[v] = sum_{b,t: ids_bt = v} w_b g_bt          ids [B, T] int64, g [B, T, d], weights [B] -> [num_embeddings, d]

Positions with a negative id, and samples of weight 0, are not read. The positions are sorted by id first, so each row
is summed by one program in a fixed order: no atomics, the same bits on every run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, inner, pointer, randn, random_ids, start, widen
from flashdp_compile.kernels.family import Family


def reference(ids: Tensor, g: Tensor, weights: Tensor, num_embeddings: int) -> Tensor:
    (g,) = widen(g)
    sample, position = torch.nonzero((ids >= 0) & (weights != 0)[:, None], as_tuple=True)
    scaled = g[sample, position] * weights.to(g.dtype)[sample, None]
    return g.new_zeros((num_embeddings, g.shape[2])).index_add_(0, ids[sample, position], scaled)


def fake(ids: Tensor, g: Tensor, weights: Tensor, num_embeddings: int) -> Tensor:
    return g.new_empty((num_embeddings, g.shape[2]), dtype=accumulator(g))


@dataclass(frozen=True)
class Spec:
    g_inner: bool
    block_n: int = 16
    block_d: int = 128


def specialise(ids: Tensor, g: Tensor, weights: Tensor, num_embeddings: int) -> Spec:
    return Spec(inner(g))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    first_ptr, order_ptr,
    {{ args("g", 3, g_inner) }},
    weight_ptr, weight_s0, out_ptr, T, D, TILES_D,
):
    v = (tl.program_id(0) // TILES_D).to(tl.int64)
    d = (tl.program_id(0) % TILES_D) * {{ block_d }} + tl.arange(0, {{ block_d }})
    acc = tl.zeros([{{ block_d }}], tl.float32)
    last = tl.load(first_ptr + v + 1)
    for start in range(tl.load(first_ptr + v), last, {{ block_n }}):
        n = start + tl.arange(0, {{ block_n }})
        where = tl.load(order_ptr + n, mask=n < last, other=0)
        b, t = where // T, where % T
        w = tl.load(weight_ptr + b * weight_s0, mask=n < last, other=0.0)
        read = (w[:, None] != 0.0) & (d[None, :] < D)
        b_g = tl.load({{ at("g", "b[:, None]", "t[:, None]", "d[None, :]", g_inner) }}, mask=read, other=0.0)
        acc += tl.sum(w[:, None] * b_g.to(tl.float32), 0)
    tl.store(out_ptr + v * D + d, acc, mask=d < D)
"""


def launch(ids: Tensor, g: Tensor, weights: Tensor, num_embeddings: int) -> Tensor:
    _, T, D = g.shape
    spec = specialise(ids, g, weights, num_embeddings)
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    # row v owns order[first[v] : first[v + 1]]; negative ids lie before first[0]
    first = torch.searchsorted(ordered, torch.arange(num_embeddings + 1, device=ids.device))
    out = g.new_empty((num_embeddings, D), dtype=torch.float32)
    tiles = cdiv(D, spec.block_d)
    scale = weights, weights.stride(0)
    start(kernel(FAMILY, spec), num_embeddings * tiles, g, first, order, *pointer(g), *scale, out, T, D, tiles)
    return out


def example(case, dtype, device, generator):
    B, T, d, ids = case
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    return random_ids((B, T), ids, device, generator), randn((B, T, d), dtype, device, generator), weights, ids + 2


FAMILY = Family(
    name="embedding_sum",
    schema="(Tensor ids, Tensor g, Tensor weights, SymInt num_embeddings) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 5, 7, 3), (4, 65, 129, 9), (1, 1, 1, 1), (2, 63, 65, 1), (0, 4, 3, 2), (2, 0, 3, 2)),  # B, T, d, ids
    example=example,
)
