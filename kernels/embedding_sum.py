"""Clipped gradient of an embedding table.

    out[v] = sum_{b,t: ids_bt = v} w_b g_bt (+ noise)       ids [B, T] int64, g [B, T, d], weights [B] -> [v, d]

Positions with a negative id, and samples of weight 0, are not read. The positions are sorted by id first, so each row
is summed by one program in a fixed order: no atomics, the same bits on every run. With a key, what add_noise would
add to the sum is added in the same kernel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, inner, pointer, randn, random_ids, start, widen
from flashdp_compile.kernels.family import Family


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
    scaled = g[sample, position] * weights.to(g.dtype)[sample, None]
    out = g.new_zeros((num_embeddings, g.shape[2])).index_add_(0, ids[sample, position], scaled)
    return out if key is None else gaussian.reference(out, key, stream, std)


def fake(ids: Tensor, g: Tensor, weights: Tensor, num_embeddings: int, *noise: Any) -> Tensor:
    return g.new_empty((num_embeddings, g.shape[2]), dtype=accumulator(g))


@dataclass(frozen=True)
class Spec:
    g_inner: bool
    noise: bool
    block_n: int = 16
    block_d: int = 128


def specialise(
    ids: Tensor, g: Tensor, weights: Tensor, num_embeddings: int, key: Tensor | None = None, *noise: Any
) -> Spec:
    # a Philox block makes four elements: they must lie in one row
    return Spec(inner(g), key is not None and g.shape[2] % 4 == 0)


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    first_ptr, order_ptr,
    {{ args("g", 3, g_inner) }},
    weight_ptr, weight_s0, {% if noise %}key_ptr, noise_stream, std, {% endif %}out_ptr, T, D, TILES_D,
):
    v = (tl.program_id(0) // TILES_D).to(tl.int64)
    left = (tl.program_id(0) % TILES_D) * {{ block_d }}
    d = left + tl.arange(0, {{ block_d }})
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
{% if noise %}
    {{ draw_normals("(v * D + left) // 4 + tl.arange(0, %d)" % (block_d // 4), block_d) | indent(4) }}
    acc += std * normals
{% endif %}
    tl.store(out_ptr + v * D + d, acc, mask=d < D)
"""


def launch(
    ids: Tensor,
    g: Tensor,
    weights: Tensor,
    num_embeddings: int,
    key: Tensor | None = None,
    stream: int = 0,
    std: float = 0.0,
) -> Tensor:
    _, T, D = g.shape
    spec = specialise(ids, g, weights, num_embeddings, key)
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    # row v owns order[first[v] : first[v + 1]]; negative ids lie before first[0]
    first = torch.searchsorted(ordered, torch.arange(num_embeddings + 1, device=ids.device))
    out = g.new_empty((num_embeddings, D), dtype=torch.float32)
    tiles = cdiv(D, spec.block_d)
    scale = weights, weights.stride(0)
    noise = (key, gaussian.word(stream), std) if spec.noise else ()
    arguments = (first, order, *pointer(g), *scale, *noise, out, T, D, tiles)
    start(kernel(FAMILY, spec), num_embeddings * tiles, g, *arguments)
    return out if key is None or spec.noise else gaussian.launch(out, key, stream, std)


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
