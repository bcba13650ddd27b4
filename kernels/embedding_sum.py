"""Clipped gradient of an embedding table.

    out[v] = sum_{b,t: ids_bt = v} w_b g_bt (+ noise)       ids [B, T] int64, g [B, T, d], weights [B] -> [v, d]

Positions with a negative id, and samples of weight 0, are not read. The positions are sorted by id first, so each row
is summed by one program in a fixed order: no atomics, the same bits on every run. With a key, what add_noise would
add to the sum is what the table is filled with before the rows that occur are added.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, inner, pointer, randn, random_ids, start, widen
from flashdp_compile.kernels.family import Family, Template
from flashdp_compile.kernels.runs_of_ids import blocks, by_id, warps


def reference(
    ids: Tensor,
    g: Tensor,
    weights: Tensor,
    num_embeddings: int,
    key: Tensor | None = None,
    stream: int = 0,
    std: float = 0.0,
) -> Tensor:
    (g,) = widen(g)
    sample, position = torch.nonzero((ids >= 0) & (weights != 0)[:, None], as_tuple=True)
    scaled = g[sample, position].double() * weights.double()[sample, None]  # see embedding_sqnorm.py
    out = scaled.new_zeros((num_embeddings, g.shape[2])).index_add_(0, ids[sample, position], scaled).to(g.dtype)
    return out if key is None else gaussian.reference(out, key, stream, std)


def fake(ids: Tensor, g: Tensor, weights: Tensor, num_embeddings: int, *noise: Any) -> Tensor:
    return g.new_empty((num_embeddings, g.shape[2]), dtype=accumulator(g))


@dataclass(frozen=True)
class Spec:
    g_inner: bool
    block_d: int
    rows: int  # of one id, at a time


def specialise(ids: Tensor, g: Tensor, *rest: Any) -> Spec:
    return Spec(inner(g), *blocks(g.shape[2]))


# One program for each position in sorted order; that of an id's first position does the id's work: one row, and where
# there are more, blocks of rows.
TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    ids_ptr, order_ptr,
    {{ args("g", 3, g_inner) }},
    weight_ptr, weight_s0, out_ptr, N, T, D, V,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.load(ids_ptr + n).to(tl.int64)
    first = ((n == 0) | (tl.load(ids_ptr + tl.maximum(n - 1, 0)) != v)) & (v >= 0) & (v < V)
    d = tl.arange(0, {{ block_d }})
    place = tl.load(order_ptr + n)
    weight = tl.load(weight_ptr + place // T * weight_s0)
    end = tl.where(weight != 0.0, D, 0)
    p_one = {{ at("g", "(place // T)", "(place % T)", "d", g_inner) }}
    total = weight * tl.load(p_one, mask=(d < end) & first, other=0.0).to(tl.float32)
    n += 1
    more = first & (n < N) & (tl.load(ids_ptr + tl.minimum(n, N - 1)) == v)
    while more:
        m = n + tl.arange(0, {{ rows }})
        same = (tl.load(ids_ptr + m, mask=m < N, other=-1) == v) & (m < N)
        where = tl.load(order_ptr + m, mask=same, other=0)
        b, t = where // T, where % T
        w = tl.load(weight_ptr + b * weight_s0, mask=same, other=0.0)
        read = (w != 0.0)[:, None] & (d[None, :] < D)
        b_g = tl.load({{ at("g", "b[:, None]", "t[:, None]", "d[None, :]", g_inner) }}, mask=read, other=0.0)
        total += tl.sum(w[:, None] * b_g.to(tl.float32), 0)
        n += {{ rows }}
        more = tl.sum(same.to(tl.int32)) == {{ rows }}
    p_out, write = out_ptr + v * D + d, first & (d < D)
    tl.store(p_out, tl.load(p_out, mask=write, other=0.0) + total, mask=write)
"""

FILL = Template(
    "noise",
    """
import triton
import triton.language as tl


@triton.jit
def kernel(key_ptr, noise_stream, std, out_ptr, N):
    first = tl.program_id(0).to(tl.int64) * {{ block }}
    {{ draw_normals("first // 4 + tl.arange(0, %d)" % (block // 4), block) | indent(4) }}
    n = first + tl.arange(0, {{ block }})
    tl.store(out_ptr + n, tl.full([], std, tl.float32) * normals, mask=n < N)
""",
)


@dataclass(frozen=True)
class FillSpec:
    block: int = 1024


def launch(
    ids: Tensor,
    g: Tensor,
    weights: Tensor,
    num_embeddings: int,
    key: Tensor | None = None,
    stream: int = 0,
    std: float = 0.0,
) -> Tensor:
    B, T, D = g.shape
    spec = specialise(ids, g)
    if key is None:
        out = g.new_zeros((num_embeddings, D), dtype=torch.float32)
    else:
        out, fill = g.new_empty((num_embeddings, D), dtype=torch.float32), FillSpec()
        drawing = (key, gaussian.word(stream), std)
        start(kernel(FILL, fill), cdiv(out.numel(), fill.block), g, *drawing, out, out.numel())
    arguments = (*by_id(ids), *pointer(g), weights, weights.stride(0), out, B * T, T, D, num_embeddings)
    start(kernel(FAMILY, spec), B * T, g, *arguments, num_warps=warps(spec.block_d))
    return out


def example(case, dtype, device, generator):
    B, T, d, ids = case
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    return random_ids((B, T), ids, device, generator), randn((B, T, d), dtype, device, generator), weights, ids + 2


FAMILY = Family(
    name="embedding_sum",
    schema="(Tensor ids, Tensor g, Tensor weights, SymInt num_embeddings, "
    "Tensor? key=None, int stream=0, float std=0.0) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 5, 7, 3), (4, 65, 129, 9), (1, 1, 1, 1), (2, 63, 65, 1), (0, 4, 3, 2), (2, 0, 3, 2)),  # B, T, d, ids
    example=example,
)
