"""Clipped weight gradient straight from the factors.

    out = sum_b w_b x_b^T g_b (+ noise)          x [B, T, d], g [B, T, p], weights [B] -> [d, p]

`weighted_matmuls` for one layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import weighted_matmuls
from flashdp_compile.kernels.common import randn
from flashdp_compile.kernels.family import Family


def reference(
    x: Tensor, g: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0
) -> Tensor:
    return weighted_matmuls.reference([x], [g], [weights], key, [stream], std)[0]


def fake(x: Tensor, g: Tensor, weights: Tensor, *noise: Any) -> Tensor:
    return weighted_matmuls.fake([x], [g], [weights])[0]


def specialise(x: Tensor, g: Tensor, weights: Tensor, key: Tensor | None = None, *noise: Any) -> weighted_matmuls.Spec:
    return weighted_matmuls.specialise([x], [g], [weights], key)


def launch(
    x: Tensor, g: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0
) -> Tensor:
    return weighted_matmuls.launch([x], [g], [weights], key, [stream], std)[0]


def prepare(
    x: Tensor, g: Tensor, weights: Tensor, key: Tensor | None = None, stream: int = 0, std: float = 0.0
) -> Callable[..., Tensor]:
    sums = weighted_matmuls.prepare([x], [g], [weights], key, [stream], std)

    # torch calls an op's body without the last arguments where these are the defaults
    def total(x: Tensor, g: Tensor, weights: Tensor, key: Any = None, stream: int = 0, std: float = 0.0) -> Tensor:
        return sums([x], [g], [weights], key, [stream], std)[0]

    return total


def example(case, dtype, device, generator):
    B, T, d, p = case
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    return randn((B, T, d), dtype, device, generator), randn((B, T, p), dtype, device, generator), weights


FAMILY = Family(
    name="weighted_matmul",
    schema="(Tensor x, Tensor g, Tensor weights, Tensor? key=None, int stream=0, float std=0.0) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=weighted_matmuls.TEMPLATE,
    cases=((3, 5, 7, 9), (4, 65, 63, 65), (1, 1, 1, 1), (2, 3, 130, 1), (0, 4, 3, 2), (2, 0, 3, 2)),  # B, T, d, p
    example=example,
    tiled=True,
    stays_op=lambda x, g, *rest: weighted_matmuls.stays_op([x], [g]),
    prepare=prepare,
)
