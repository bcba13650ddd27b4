"""Clipped weight gradient straight from the factors.

    out = sum_b w_b x_b^T g_b          x [B, T, d], g [B, T, p], weights [B] -> [d, p]

Each sample's product is accumulated in float32 and then scaled in float32: neither x nor g is scaled and rounded to
its own narrow dtype, so what is added has the norm that was clipped, to within float32 rounding. A sample of weight 0
is not read, whatever it holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, inner, pointer, randn, sample_products, start
from flashdp_compile.kernels.family import Family


def reference(x: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    out = x.new_zeros((x.shape[2], g.shape[2]), dtype=accumulator(x, g))
    kept = (weights != 0)[:, None, None]
    x, g = x.where(kept, x.new_zeros(())), g.where(kept, g.new_zeros(()))
    for run, products in sample_products(x, g):
        out += torch.tensordot(weights[run].to(out.dtype), products, 1)
    return out


def fake(x: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty((x.shape[2], g.shape[2]), dtype=accumulator(x, g))


@dataclass(frozen=True)
class Spec:
    dot_type: str
    x_inner: bool
    g_inner: bool
    block_d: int = 64
    block_p: int = 64
    block_t: int = 32


def specialise(x: Tensor, g: Tensor, weights: Tensor) -> Spec:
    return Spec(dot_type(x, g), inner(x), inner(g))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    {{ args("x", 3, x_inner) }},
    {{ args("g", 3, g_inner) }},
    weight_ptr, weight_s0, out_ptr, B, T, D, P, TILES_P,
):
    tile = tl.program_id(0)
    d = (tile // TILES_P) * {{ block_d }} + tl.arange(0, {{ block_d }})
    p = (tile % TILES_P) * {{ block_p }} + tl.arange(0, {{ block_p }})
    total = tl.zeros([{{ block_d }}, {{ block_p }}], tl.float32)
    for sample in range(0, B):
        w = tl.load(weight_ptr + sample * weight_s0)
        if w != 0.0:
            b = tl.full([], sample, tl.int64)
            acc = tl.zeros([{{ block_d }}, {{ block_p }}], tl.float32)
            for first in range(0, T, {{ block_t }}):
                t = first + tl.arange(0, {{ block_t }})
                inside_x, inside_g = (t[:, None] < T) & (d[None, :] < D), (t[:, None] < T) & (p[None, :] < P)
                p_x = {{ at("x", "b", "t[:, None]", "d[None, :]", x_inner) }}
                p_g = {{ at("g", "b", "t[:, None]", "p[None, :]", g_inner) }}
                b_x = tl.load(p_x, mask=inside_x, other=0.0).to({{ dot_type }})
                b_g = tl.load(p_g, mask=inside_g, other=0.0).to({{ dot_type }})
                acc = {{ dot("tl.trans(b_x)", "b_g", "acc") }}
            total += w * acc
    tl.store(out_ptr + d[:, None].to(tl.int64) * P + p[None, :], total, mask=(d[:, None] < D) & (p[None, :] < P))
"""


def launch(x: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    (B, T, D), P = x.shape, g.shape[2]
    spec = specialise(x, g, weights)
    tiles_p = cdiv(P, spec.block_p)
    out = x.new_empty((D, P), dtype=torch.float32)
    scale = weights, weights.stride(0)
    programs = cdiv(D, spec.block_d) * tiles_p
    start(kernel(FAMILY, spec), programs, out, *pointer(x), *pointer(g), *scale, out, B, T, D, P, tiles_p)
    return out


def example(case, dtype, device, generator):
    B, T, d, p = case
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    return randn((B, T, d), dtype, device, generator), randn((B, T, p), dtype, device, generator), weights


FAMILY = Family(
    name="weighted_matmul",
    schema="(Tensor x, Tensor g, Tensor weights) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 5, 7, 9), (4, 65, 63, 65), (1, 1, 1, 1), (2, 3, 130, 1), (0, 4, 3, 2), (2, 0, 3, 2)),  # B, T, d, p
    example=example,
)
