"""Squared norms of the per-sample gradients of an embedding table.

    out[b] = sum_v |sum_{t: ids_bt = v} g_bt|^2

ids [B, T] int64, g [B, T, d] -> [B]. Positions with a negative id are excluded and their g is not read: mask
padding_idx so. The positions are sorted by id, where those of one id and one sample lie side by side: a run. The rows
of a run are added up, then squared; a run is worth as much work as it has rows, however often an id repeats.

Rounding is relative to the sum of the rows' lengths, which is more than the length of their sum where they cancel:
guard.py says how the result then bounds the true norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, inner, pointer, randn, random_ids, start, widen
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.guard import gamma, guarded_root
from flashdp_compile.kernels.runs_of_ids import blocks, by_id, warps


def reference(ids: Tensor, g: Tensor) -> Tensor:
    (g,) = widen(g)
    out = g.new_zeros(ids.shape[0])
    sample, position = torch.nonzero(ids >= 0, as_tuple=True)
    if sample.numel() == 0:
        return out
    pairs, segment = torch.unique(torch.stack([sample, ids[sample, position]]), dim=1, return_inverse=True)
    rows = g[sample, position].double()  # one after the other they would be rounded to one side
    sums = rows.new_zeros((pairs.shape[1], g.shape[2])).index_add_(0, segment, rows).to(g.dtype)
    lengths = rows.new_zeros(pairs.shape[1]).index_add_(0, segment, rows.square().sum(1).sqrt()).to(g.dtype)
    est = out.index_add(0, pairs[0], sums.square().sum(1))
    bound = gamma(g.dtype, g.shape[1]) * out.index_add(0, pairs[0], lengths.square()).sqrt()
    return guarded_root(est, bound)


def fake(ids: Tensor, g: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], dtype=accumulator(g))


@dataclass(frozen=True)
class Spec:
    g_inner: bool
    block_d: int
    rows: int  # of a run, at a time


def specialise(ids: Tensor, g: Tensor) -> Spec:
    return Spec(inner(g), *blocks(g.shape[2]))


# One program for each position in sorted order; that of a run's first position does the run's work: one row, and where
# there are more, blocks of rows.
TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    ids_ptr, order_ptr,
    {{ args("g", 3, g_inner) }},
    part_ptr, length_ptr, N, T, D,
):
    n = tl.program_id(0).to(tl.int64)
    place = tl.load(order_ptr + n)
    v, b = tl.load(ids_ptr + n), place // T
    before = tl.maximum(n - 1, 0)
    first = (n == 0) | (tl.load(ids_ptr + before) != v) | (tl.load(order_ptr + before) // T != b)
    d = tl.arange(0, {{ block_d }})
    one = (d < D) & first & (v >= 0)
    total = tl.load({{ at("g", "b", "(place % T)", "d", g_inner) }}, mask=one, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(total * total))
    n += 1
    after = tl.minimum(n, N - 1)
    more = first & (v >= 0) & (n < N) & (tl.load(ids_ptr + after) == v) & (tl.load(order_ptr + after) // T == b)
    while more:
        m = n + tl.arange(0, {{ rows }})
        where = tl.load(order_ptr + m, mask=m < N, other=-1)
        same = (tl.load(ids_ptr + m, mask=m < N, other=-1) == v) & (where // T == b) & (m < N)
        t = tl.where(same, where % T, 0)
        read = same[:, None] & (d[None, :] < D)
        b_g = tl.load({{ at("g", "b", "t[:, None]", "d[None, :]", g_inner) }}, mask=read, other=0.0).to(tl.float32)
        total += tl.sum(b_g, 0)
        length += tl.sum(tl.sqrt(tl.sum(b_g * b_g, 1)))
        n += {{ rows }}
        more = tl.sum(same.to(tl.int32)) == {{ rows }}
    tl.store(part_ptr + place, tl.sum(total * total))
    tl.store(length_ptr + place, length * length)
"""


def launch(ids: Tensor, g: Tensor) -> Tensor:
    B, T, D = g.shape
    spec = specialise(ids, g)
    part, length = (g.new_empty((B, T), dtype=torch.float32) for _ in range(2))
    arguments = (*by_id(ids), *pointer(g), part, length, B * T, T, D)
    start(kernel(FAMILY, spec), B * T, g, *arguments, num_warps=warps(spec.block_d))
    return guarded_root(part.sum(1), gamma(torch.float32, T) * length.sum(1).sqrt())


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
