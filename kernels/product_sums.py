"""Weighted sums of stored per-sample gradients of several layers, in one launch.

    out_i = sum_b w_ib product_ib (+ noise)      product_i [B, d_i, p_i], w_i [B] -> [d_i, p_i]

A sample of weight 0 is not read: its product may hold NaN or infinity. Sums are in float32. With a key, what add_noise
would add to out_i for (key, streams_i) is added in the same kernel, to the same bits. A launch takes some microseconds
before memory is busy, and as long to end: as long as the sum of a small layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian, several
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, example_key, randn, start
from flashdp_compile.kernels.family import Family, supported


def reference(
    products: list[Tensor], weights: list[Tensor], key: Tensor | None, streams: list[int], std: float
) -> list[Tensor]:
    sums = [_reference(product, w) for product, w in zip(products, weights, strict=True)]
    if key is None:
        return sums
    return [gaussian.reference(total, key, stream, std) for total, stream in zip(sums, streams, strict=True)]


def _reference(product: Tensor, weights: Tensor) -> Tensor:
    keep = weights != 0
    if not keep.all():
        product, weights = product[keep], weights[keep]
    dtype = accumulator(product)
    return torch.tensordot(weights.to(dtype), product.to(dtype), dims=1).contiguous()


def fake(products: list[Tensor], *rest: Any) -> list[Tensor]:
    return [product.new_empty(product.shape[1:], dtype=accumulator(product)) for product in products]


AT_ONCE = 8


@dataclass(frozen=True)
class Spec:
    flat: bool  # see is_flat
    noise: bool
    weighted: bool
    kinds: tuple[int, ...]  # how many layers are of each
    at_once: int = AT_ONCE  # samples whose loads are in flight together
    onto: bool = False  # whether sums are added to what is there
    block: int = 2048


def is_flat(product: Tensor) -> bool:
    """Whether the rows of one sample's product lie end to end."""
    return product.stride(2) == 1 and product.stride(1) == product.shape[2]


def specialise(
    products: list[Tensor], weights: list[Tensor] | None, key: Tensor | None = None, *noise: Any, onto: bool = False
) -> Spec:
    """Settings for layers with as many samples."""
    samples = products[0].shape[0]
    at_once = min(AT_ONCE, max(samples, 1)) if isinstance(samples, int) else AT_ONCE
    kinds = tuple(map(len, several.kinds(products, *([] if weights is None else [weights]))))
    return Spec(all(map(is_flat, products)), key is not None, weights is not None, kinds, at_once, onto)


TEMPLATE = """
{%- set pointers = ["product_ptr"] + (["weight_ptr"] if weighted else []) + ["out_ptr"] -%}
{%- set numbers = ["noise_stream"] if noise else [] -%}
{%- set strides = ["product_s0"] + ([] if flat else ["product_s1", "product_s2"])
    + (["weight_s0"] if weighted else []) -%}
{%- set names = [pointers, numbers, ["PROGRAMS", "P", "N"], strides, kinds] -%}
import triton
import triton.language as tl


@triton.jit
def kernel(
    {{ parameters(*names) | indent(4) -}}
    {{ "    " }}{{ "key_ptr, std, " if noise }}B,
):
    {{ selected("tl.program_id(0)", *names) | indent(4) }}
    start = number.to(tl.int64) * {{ block }}
    n = start + tl.arange(0, {{ block }})
{% if flat %}
    p_row = product_ptr + n
{% else %}
    p_row = product_ptr + n // P * product_s1 + n % P * product_s2
{% endif %}
{% if onto %}
    acc = tl.load(out_ptr + n, mask=n < N, other=0.0)
{% else %}
    acc = tl.zeros([{{ block }}], tl.float32)
{% endif %}
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
    products: list[Tensor],
    weights: list[Tensor] | None,
    key: Tensor | None = None,
    streams: Sequence[int] = (),
    std: float = 0.0,
    onto: list[Tensor] | None = None,
) -> list[Tensor]:
    """Without weights, which the op always has: plain sums.

    With `onto`, dense and in float32, sums are added to that in place, in the order of one sum over all samples.
    """
    spec = specialise(products, weights, key, onto=onto is not None)
    by_kind = several.kinds(products, *([] if weights is None else [weights]))
    out = onto or [product.new_empty(product.shape[1:], dtype=torch.float32) for product in products]
    own: list[tuple[Any, ...]] = [(p, t) for p, t in zip(products, out, strict=True)]
    if weights is not None:
        own = [(p, w, t) for (p, t), w in zip(own, weights, strict=True)]
    if key is not None:
        own = [(*tensors, gaussian.word(stream)) for tensors, stream in zip(own, streams, strict=True)]
    common, programs = [], 0
    for numbers in by_kind:
        product = products[numbers[0]]
        B, D, P = product.shape
        count = cdiv(D * P, spec.block)
        strides = product.stride()[:1] if spec.flat else product.stride()
        common.append((count, P, D * P, *strides, *(() if weights is None else weights[numbers[0]].stride())))
        programs += count * len(numbers)
    arguments = several.arguments(own, common, by_kind) + ([] if key is None else [key, std])
    start(kernel(FAMILY, spec), programs, out[0], *arguments, products[0].shape[0])
    return out


def supports(products: list[Tensor], weights: list[Tensor], *noise: Any) -> bool:
    return supported(*products, *weights) and all(p.shape[0] == products[0].shape[0] for p in products[1:])


def example(case, dtype, device, generator):
    B, *widths = case
    products = [randn((B, d, p), dtype, device, generator) for d, p in zip(widths[::2], widths[1::2], strict=True)]
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    key = example_key(device)
    count = range(len(products))
    return products, [weights * (1 + n) for n in count], key, [7 + 1000003 * n for n in count], 0.7


FAMILY = Family(
    name="product_sums",
    schema="(Tensor[] products, Tensor[] weights, Tensor? key, int[] streams, float std) -> Tensor[]",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    # B, d_0, p_0, d_1, p_1, ...
    cases=((3, 5, 7, 9, 4), (5, 63, 65, 8, 64, 63, 65, 130, 64), (1, 1, 1, 1, 1), (0, 3, 2, 2, 2), (2, 0, 3, 4, 4)),
    example=example,
    supports=supports,
)
