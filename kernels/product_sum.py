"""Weighted sum of stored per-sample gradients.

    out = sum_b w_b product_b (+ noise)          product [B, d, p], weights [B] -> [d, p]

`product_sums` of one layer.
"""

from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import product_sums
from flashdp_compile.kernels.common import accumulator, randn
from flashdp_compile.kernels.family import Family


def reference(product: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0) -> Tensor:
    return product_sums.reference([product], [weights], key, [stream], std)[0]


def fake(product: Tensor, weights: Tensor, *noise: Any) -> Tensor:
    return product.new_empty(product.shape[1:], dtype=accumulator(product))


def specialise(product: Tensor, weights: Tensor, key: Tensor | None = None, *noise: Any) -> product_sums.Spec:
    return product_sums.specialise([product], [weights], key)


def launch(product: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0) -> Tensor:
    return product_sums.launch([product], [weights], key, [stream], std)[0]


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
    template=product_sums.TEMPLATE,
    cases=((3, 5, 7), (5, 63, 65), (1, 1, 1), (0, 3, 2), (2, 0, 3)),  # B, d, p
    example=example,
)
