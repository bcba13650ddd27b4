"""Squared norms of the per-sample gradients of an embedding table, by pairs of positions.

    out[b] = sum_v |sum_{t: ids_bt = v} g_bt|^2 = sum_{t,u: ids_bt = ids_bu >= 0} g_bt . g_bu

ids [B, T] int64, g [B, T, d] -> [B]. Positions with a negative id are excluded and their g is not read: mask
padding_idx so. Both versions carry the guard of kernels/guard.py. The Triton kernel sums over pairs, with the sum
over equal pairs of
|g_t| |g_u| in the place of R^2, which is tighter. The twin sums each id's rows first: their rounding is relative to the
sum of their lengths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, inner, pointer, randn, random_ids, start, widen
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.guard import floor, gamma, guarded, guarded_root


def reference(ids: Tensor, g: Tensor) -> Tensor:
    (g,) = widen(g)
    out = g.new_zeros(ids.shape[0])
    sample, position = torch.nonzero(ids >= 0, as_tuple=True)
    if sample.numel() == 0:
        return out
    pairs, segment = torch.unique(torch.stack([sample, ids[sample, position]]), dim=1, return_inverse=True)
    rows = g[sample, position]
    sums = g.new_zeros((pairs.shape[1], g.shape[2])).index_add_(0, segment, rows)
    lengths = g.new_zeros(pairs.shape[1]).index_add_(0, segment, rows.square().sum(1).sqrt())
    est = out.index_add(0, pairs[0], sums.square().sum(1))
    bound = gamma(g.dtype, g.shape[1]) * out.index_add(0, pairs[0], lengths.square()).sqrt()
    return guarded_root(est, bound)


def fake(ids: Tensor, g: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], dtype=accumulator(g))


@dataclass(frozen=True)
class Spec:
    dot_type: str
    g_inner: bool
    block_t: int = 64
    block_k: int = 32


def specialise(ids: Tensor, g: Tensor) -> Spec:
    return Spec(dot_type(g), inner(g))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    ids_ptr, ids_s0, ids_s1,
    {{ args("g", 3, g_inner) }},
    part_ptr, bound_ptr, T, D, g_floor, PAIRS,
):
    b = (tl.program_id(0) // PAIRS).to(tl.int64)
    pair = tl.program_id(0) % PAIRS
    # pair = i (i + 1) / 2 + j with j <= i; the root in float32 may be off by one
    i = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > pair, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= pair, i + 1, i)
    j = pair - i * (i + 1) // 2
    t = i * {{ block_t }} + tl.arange(0, {{ block_t }})
    u = j * {{ block_t }} + tl.arange(0, {{ block_t }})
    p_ids = ids_ptr + b * ids_s0
    id_t = tl.load(p_ids + t.to(tl.int64) * ids_s1, mask=t < T, other=-1)
    id_u = tl.load(p_ids + u.to(tl.int64) * ids_s1, mask=u < T, other=-1)

    g = tl.zeros([{{ block_t }}, {{ block_t }}], tl.float32)
    square_t = tl.zeros([{{ block_t }}], tl.float32)
    square_u = tl.zeros([{{ block_t }}], tl.float32)
    for first in range(0, D, {{ block_k }}):
        k = first + tl.arange(0, {{ block_k }})
        inside_t, inside_u = (id_t[:, None] >= 0) & (k[None, :] < D), (id_u[:, None] >= 0) & (k[None, :] < D)
        b_t = tl.load({{ at("g", "b", "t[:, None]", "k[None, :]", g_inner) }}, mask=inside_t, other=0.0)
        b_u = tl.load({{ at("g", "b", "u[:, None]", "k[None, :]", g_inner) }}, mask=inside_u, other=0.0)
        g += {{ fresh_dot("b_t", "tl.trans(b_u)", block_k) }}
        square_t += tl.sum(b_t.to(tl.float32) * b_t.to(tl.float32), 1)
        square_u += tl.sum(b_u.to(tl.float32) * b_u.to(tl.float32), 1)

    same = (id_t[:, None] == id_u[None, :]) & (id_t[:, None] >= 0)
    roots = tl.sqrt(square_t + g_floor)[:, None] * tl.sqrt(square_u + g_floor)[None, :]
    twice = tl.where(i == j, 1.0, 2.0)
    tl.store(part_ptr + b * PAIRS + pair, twice * tl.sum(tl.where(same, g, 0.0)))
    tl.store(bound_ptr + b * PAIRS + pair, twice * tl.sum(tl.where(same, roots, 0.0)))
"""


def launch(ids: Tensor, g: Tensor) -> Tensor:
    B, T, D = g.shape
    spec = specialise(ids, g)
    blocks = cdiv(T, spec.block_t)
    pairs = blocks * (blocks + 1) // 2
    part, bound = (g.new_empty((B, pairs), dtype=torch.float32) for _ in range(2))
    g_floor = floor(torch.float32, D)
    start(kernel(FAMILY, spec), B * pairs, g, ids, *ids.stride(), *pointer(g), part, bound, T, D, g_floor, pairs)
    return guarded(part.sum(1), gamma(torch.float32, cdiv(D, spec.block_k)) * bound.sum(1))


def example(case, dtype, device, generator):
    B, T, d, ids = case
    return random_ids((B, T), ids, device, generator), randn((B, T, d), dtype, device, generator)


FAMILY = Family(
    name="embedding_sqnorm",
    schema="(Tensor ids, Tensor g) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    # B, T, d, number of ids
    cases=((3, 5, 7, 3), (2, 65, 63, 20), (1, 1, 1, 1), (3, 130, 33, 1000), (2, 63, 65, 1), (0, 4, 3, 2), (2, 0, 3, 2)),
    example=example,
)
