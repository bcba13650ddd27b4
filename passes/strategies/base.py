"""What a strategy is: operands in, squared norms out; then weights in, clipped sum out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from flashdp_compile.passes.axes.domain import Batched
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import Cost
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.points import ParameterGradient


@dataclass(frozen=True)
class Prepared:
    """Nodes of one gradient after the first half of a strategy.

    `sqnorm` holds the squared norms [B], float32 or wider; None where another gradient's holds them as well.
    `finish(weights)` writes the second half: the node of sum_b weights[b] * (gradient of sample b), shaped as the
    gradient and in the dtype of accumulation, a sample of weight 0 left out.
    """

    sqnorm: fx.Node | None
    finish: Callable[[fx.Node], fx.Node]


Together = Callable[[Emitter, Axes, Sequence[ParameterGradient]], tuple[Callable[..., Tensor], tuple[fx.Node, ...]]]
"""(norm, more): norm(x [B, T, d], gs of [B, T, p_l], *more) is the squared norm [B] of x^T g over all these gradients
together; `more` are graph nodes without samples, such as a key."""


@dataclass(frozen=True)
class Strategy:
    """`applies` says which gradients it can treat, `prepare` writes it into the graph.

    `slack`: the norm of what is released may exceed the bound by this factor, at most, from rounding; the noise is
    raised by as much. `trial(x, g, weights)` runs both halves on factors x [B, T, d] and g [B, T, p], to be timed.
    `together` tells how to measure linear layers that share an operand at once, if all have this same Strategy object:
    one that is made for an option must be cached. `probes`: how many Gaussian probes the norm is estimated from, None
    for a norm that is exact; `emit.probe_key` is then their key.
    """

    name: str
    applies: Callable[[ParameterGradient, Axes], bool]
    prepare: Callable[[Emitter, Axes, ParameterGradient], Prepared]
    cost: Callable[[ParameterGradient, Axes], Cost]
    slack: float
    trial: Callable[[Tensor, Tensor, Tensor], object] | None = None
    together: Together | None = None
    probes: int | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms and sums are at least float32."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """Floating tensors in the dtype of accumulation, others as they are."""
    return x.to(accumulation_dtype(x.dtype)) if x.is_floating_point() else x


def split(x: Tensor, axis: Batched, batch: int | torch.SymInt) -> Tensor:
    """[..., outer*B*inner, ...] -> [B, ..., outer*inner, ...]: every sample's own slice, a view where possible."""
    outer, inner = (int(f) if isinstance(f, int) or f.is_number else f for f in (axis.outer, axis.inner))
    shape = list(x.shape)
    if outer == 1:
        rest = shape[axis.dim] // batch if not isinstance(inner, int) else inner
        return x.view(*shape[: axis.dim], batch, rest, *shape[axis.dim + 1 :]).movedim(axis.dim, 0)
    if inner == 1:
        rest = shape[axis.dim] // batch if not isinstance(outer, int) else outer
        return x.view(*shape[: axis.dim], rest, batch, *shape[axis.dim + 1 :]).movedim(axis.dim + 1, 0)
    first = outer if isinstance(outer, int) else shape[axis.dim] // (batch * inner)
    last = inner if isinstance(inner, int) else shape[axis.dim] // (batch * first)
    parts = x.view(*shape[: axis.dim], first, batch, last, *shape[axis.dim + 1 :]).movedim(axis.dim + 1, 0)
    return parts.flatten(axis.dim + 1, axis.dim + 2)


def weigh(values: Tensor, weights: Tensor) -> Tensor:
    """sum_b weights[b] * values[b] for values [B, ...]; a sample of weight 0 counts as zero, finite or not."""
    w = weights.view(-1, *[1] * (values.dim() - 1))
    return torch.where(w != 0, values * w, torch.zeros((), dtype=values.dtype, device=values.device)).sum(0)
