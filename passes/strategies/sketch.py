"""Norms that are estimated by Gaussian probes (docs/randomized_clipping.md): linear layers, and a tied embedding.

These are strategies only where the option `norm` asks for them, as the noise has to pay for what an estimate misses.
Each gradient has streams of its own under the one key of the release, so that no two share probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import sympy
import torch
from torch import Tensor

from flashdp_compile.kernels.guard import SLACK
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import (
    device_of,
    linear_kernels,
    linear_sizes,
    sketch_cost,
    sketch_kernel,
    tied_sketch_cost,
)
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Prepared, Strategy
from flashdp_compile.passes.strategies.embedding import is_tied, tied_operands, tied_sum
from flashdp_compile.passes.strategies.linear import is_linear, weighted_product
from flashdp_compile.passes.strategies.operands import linear_operands

ops = torch.ops.flashdp
Norm = Callable[..., Tensor]
"""(key, the two streams of the gradient, *operands) -> squared norms [B]."""


def streams(axes: Axes, gradient: ParameterGradient) -> tuple[int, int]:
    """The two streams of probes that belong to a gradient alone."""
    number = axes.joint.gradients.index(gradient.gradient)
    return 2 * number, 2 * number + 1


def pays(gradient: ParameterGradient, axes: Axes, probes: int) -> bool:
    """2 k (d + p) < d p: an estimate, in two halves, multiplies less than the layer's product does. (Hutch++ takes four
    times that, so it may cost more than an exact norm.)"""
    s = linear_sizes(gradient, axes)
    return bool(2 * probes * (s.d + s.p) < s.d * s.p)


NOMINAL = 16, 1024  # samples and tokens for which `worthwhile` is asked, whatever there are


def worthwhile(gradient: ParameterGradient, axes: Axes, probes: int) -> bool:
    """Whether an estimate is predicted to be faster than exact norms, for batches of nominal size. A tied table is
    asked for its head alone, as if that were a layer of its own."""
    B, T = map(sympy.Integer, NOMINAL)
    sizes = replace(linear_sizes(gradient, axes), B=B, T=T)
    device = device_of(gradient)
    exact = linear_kernels(sizes, device)
    estimate = sketch_kernel(sizes, probes), exact["outer"][1]
    fastest = min(device.seconds(kernels) for kernels in exact.values())
    return pays(gradient, axes, probes) and bool(device.seconds(estimate) < fastest)


def _prepare(norm: Norm, operands_of: Callable[..., Any], sum_of: Callable[..., Any]) -> Callable[..., Prepared]:
    """The first half by `norm`, whose probes are of the gradient's own streams; the second is that of exact norms."""

    def prepare(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
        operands, own = operands_of(gradient, axes), streams(axes, gradient)

        def sqnorm(batch: Any, key: Tensor, *values: Tensor) -> Tensor:
            return norm(key, own, *operands.view(batch, *values))

        found = emit.per_sample(sqnorm, emit.probe_key, *operands.leaves)
        return Prepared(found, sum_of(emit, axes, gradient))

    return prepare


@cache
def hutchinson(probes: int) -> Strategy:
    """|M P|^2 in the place of |M|^2, for the product M of a layer, or of several that share an input."""

    def norm(key: Tensor, own: tuple[int, int], x: Tensor, g: Tensor) -> Tensor:
        # the wider side is the one that is projected: it is read in longer rows
        narrow, wide = (x, g) if x.shape[2] <= g.shape[2] else (g, x)
        return ops.sketch_sqnorm(narrow, [wide], key, [own[0]], probes)

    def together(emit: Emitter, axes: Axes, gradients: Sequence[ParameterGradient]) -> Any:
        own = [streams(axes, gradient)[0] for gradient in gradients]
        return (lambda x, gs, key: ops.sketch_sqnorm(x, gs, key, own, probes)), (emit.probe_key,)

    prepare, cost = _prepare(norm, linear_operands, weighted_product), partial(sketch_cost, probes=probes)
    return Strategy("hutchinson", is_linear, prepare, cost, SLACK, probes=probes, together=together)


@cache
def tied_hutchinson(probes: int) -> Strategy:
    """A table that is embedding and head: the products of both with the same probes are added up, then squared."""

    def norm(key: Tensor, own: tuple[int, int], *operands: Tensor) -> Tensor:
        return ops.tied_sketch_sqnorm(*operands, key, own[0], probes)

    prepare, cost = _prepare(norm, tied_operands, tied_sum), partial(tied_sketch_cost, probes=probes)
    return Strategy("hutchinson", is_tied, prepare, cost, SLACK, probes=probes)


@cache
def hutchplusplus(probes: int) -> Strategy:
    """The norm of what lies in a space found by one sketch, exactly, and an estimate of the rest by another."""

    def norm(key: Tensor, own: tuple[int, int], x: Tensor, g: Tensor) -> Tensor:
        return ops.hutchpp_sqnorm(x, g, key, list(own), probes)

    prepare, cost = _prepare(norm, linear_operands, weighted_product), partial(sketch_cost, probes=4 * probes)
    return Strategy("hutch++", is_linear, prepare, cost, SLACK, probes=probes)
