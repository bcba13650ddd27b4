"""Takes apart torch's ops for the distances between all pairs of rows: `torch.cdist` of few rows, and its backward.

The backward op adds the gradients of a row up over all rows on the other side. Where these are samples, as for centers
or prototypes that are parameters, no rule could clip them inside. The formulas are those of ATen/native/cpu/
DistanceOpsKernel.cpp (2.11, 2.13), and so are the values where a difference or a distance is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashdp_compile.compat import OpOverload

aten = torch.ops.aten


def cdist(x: Tensor, y: Tensor, p: float, mode: int | None) -> Tensor:
    """Distances [..., P, R] in the p-norm of rows of x [..., P, M] and y [..., R, M]; `mode` chooses among kernels."""
    apart = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).sum(-1).to(x.dtype)
    if p == 1:
        return apart.sum(-1)
    if p == 2:
        return apart.square().sum(-1).sqrt()
    return apart.amax(-1) if math.isinf(p) else apart.pow(p).sum(-1).pow(1 / p)


def cdist_backward(grad: Tensor, x: Tensor, y: Tensor, p: float, distance: Tensor) -> Tensor:
    """The gradient of x [..., P, M] for that of the distances [..., P, R]."""
    apart = x.unsqueeze(-2) - y.unsqueeze(-3)
    grad, distance = grad.unsqueeze(-1), distance.unsqueeze(-1)
    if p == 0:
        each = torch.zeros_like(apart)
    elif p == 1:
        each = grad * apart.sign()
    elif math.isinf(p):
        each = grad * apart.sign() * (apart.abs() == distance)
    else:
        towards = apart if p == 2 else apart.sign() * apart.abs().pow(p - 1)
        flat = (distance == 0) | ((apart == 0) if p < 1 else False)
        each = torch.where(flat, 0.0, grad * towards / distance.pow(p - 1))
    return each.sum(-2)


FORMULAS: dict[OpOverload, Callable[..., Tensor]] = {
    aten._cdist_forward.default: cdist,
    aten._cdist_backward.default: cdist_backward,
}
