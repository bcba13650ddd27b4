"""Weighted sum of stored per-sample gradients.

    out = sum_b w_b product_b (+ noise)          product [B, d, p], weights [B] -> [d, p]

A sample of weight 0 is not read: its product may hold NaN or infinity. Sums are in float32. With a key, what add_noise
would add to the sum is added in the same kernel, to the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, randn, start
from flashdp_compile.kernels.family import Family


def reference(product: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0) -> Tensor:
    keep = weights != 0
    if not keep.all():
        product, weights = product[keep], weights[keep]
    dtype = accumulator(product)
    total = torch.tensordot(weights.to(dtype), product.to(dtype), dims=1).contiguous()
    return total if key is None else gaussian.reference(total, key, stream, std)


def fake(product: Tensor, weights: Tensor, *noise: Any) -> Tensor:
    return product.new_empty(product.shape[1:], dtype=accumulator(product))


AT_ONCE = 8


@dataclass(frozen=True)
class Spec:
    flat: bool  # rows of one sample's product lie end to end
    noise: bool
    weighted: bool = True
    at_once: int = AT_ONCE  # samples whose loads are in flight together
    block: int = 2048


def specialise(product: Tensor, weights: Tensor | None, key: Tensor | None = None, *noise: Any) -> Spec:
    flat = product.stride(2) == 1 and product.stride(1) == product.shape[2]
    samples = product.shape[0]
    at_once = min(AT_ONCE, max(samples, 1)) if isinstance(samples, int) else AT_ONCE
    return Spec(flat, key is not None, weights is not None, at_once)


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    product_ptr, product_s0, {% if not flat %}product_s1, product_s2, {% endif %}
    {% if weighted %}weight_ptr, weight_s0, {% endif %}
    {% if noise %}key_ptr, noise_stream, std, {% endif %}out_ptr, B, P, N,
):
    start = tl.program_id(0).to(tl.int64) * {{ block }}
    n = start + tl.arange(0, {{ block }})
{% if flat %}
    p_row = product_ptr + n
{% else %}
    p_row = product_ptr + n // P * product_s1 + n % P * product_s2
{% endif %}
    acc = tl.zeros([{{ block }}], tl.float32)
    for first in range(0, B, {{ at_once }}):
        for b in tl.static_range({{ at_once }}):
{% if weighted %}
            w = tl.load(weight_ptr + (first + b) * weight_s0, mask=first + b < B, other=0.0)
{% else %}
            w = tl.where(first + b < B, 1.0, 0.0)
{% endif %}
            end = tl.where(w != 0.0, N, 0)  # a mask and no branch, which would wait for the weight
            p_b = p_row + tl.full([], first + b, tl.int64) * product_s0
            # products are read once; what stays in the L2 cache is better used by the next layer
            acc += w * tl.load(p_b, mask=n < end, other=0.0, eviction_policy="evict_first").to(tl.float32)
{% if noise %}
    {{ draw_normals("start // 4 + tl.arange(0, %d)" % (block // 4), block) | indent(4) }}
    acc += tl.full([], std, tl.float32) * normals
{% endif %}
    tl.store(out_ptr + n, acc, mask=n < N)
"""


def launch(
    product: Tensor, weights: Tensor | None, key: Tensor | None = None, stream: int = 0, std: float = 0.0
) -> Tensor:
    """Without weights, which the op always has: the plain sum."""
    B, D, P = product.shape
    spec = specialise(product, weights, key)
    out = product.new_empty((D, P), dtype=torch.float32)
    strides = product.stride()[:1] if spec.flat else product.stride()
    programs = cdiv(D * P, spec.block)
    noise = () if key is None else (key, gaussian.word(stream), std)
    weighted = () if weights is None else (weights, weights.stride(0))
    arguments = (product, *strides, *weighted, *noise, out, B, P, D * P)
    start(kernel(FAMILY, spec), programs, out, *arguments)
    return out


def example(case, dtype, device, generator):
    B, d, p = case
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    return randn((B, d, p), dtype, device, generator), weights


FAMILY = Family(
    name="product_sum",
    schema="(Tensor product, Tensor weights, Tensor? key=None, int stream=0, float std=0.0) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 5, 7), (5, 63, 65), (1, 1, 1), (0, 3, 2), (2, 0, 3)),  # B, d, p
    example=example,
)
