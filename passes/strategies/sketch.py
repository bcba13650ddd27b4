"""Norms that are estimated by Gaussian probes (docs/randomized_clipping.md): linear layers, and a tied embedding.

These are strategies only where the option `norm` asks for them, as the noise has to pay for what an estimate misses.
Each gradient has streams of its own under the one key of the release, so that no two share probes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor

from flashdp_compile.kernels.guard import SLACK
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import (
    Cost,
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


@cache
def hutchinson(probes: int) -> Strategy:
    """|M P|^2 in the place of |M|^2, for the product M of a layer, or of several that share an input."""

    def norm(x: Tensor, gs: list[Tensor], key: Tensor, numbers: list[int]) -> Tensor:
        return ops.sketch_sqnorm(x, gs, key, numbers, probes)

    def prepare(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
        operands, (stream, _) = linear_operands(gradient, axes), streams(axes, gradient)

        def sqnorm(batch: Any, key: Tensor, *values: Tensor) -> Tensor:
            x, g = operands.view(batch, *values)
            return norm(*_narrow_and_wide(x, g), key, [stream])

        found = emit.per_sample(sqnorm, emit.probe_key, *operands.leaves)
        return Prepared(found, weighted_product(emit, axes, gradient))

    def cost(gradient: ParameterGradient, axes: Axes) -> Cost:
        return sketch_cost(gradient, axes, probes)

    def together(emit: Emitter, axes: Axes, gradients: list[ParameterGradient]) -> Any:
        own = [streams(axes, gradient)[0] for gradient in gradients]
        return (lambda x, gs, key: norm(x, gs, key, own)), (emit.probe_key,)

    return Strategy("hutchinson", is_linear, prepare, cost, SLACK, probes=probes, together=together)


def _narrow_and_wide(x: Tensor, g: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The wider side is the one that is projected: it is read in longer rows."""
    return (x, [g]) if x.shape[2] <= g.shape[2] else (g, [x])


@cache
def tied_hutchinson(probes: int) -> Strategy:
    """A table that is embedding and head: the products of both with the same probes are added up, then squared."""

    def prepare(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
        operands, (stream, _) = tied_operands(gradient, axes), streams(axes, gradient)

        def sqnorm(batch: Any, key: Tensor, *values: Tensor) -> Tensor:
            return ops.tied_sketch_sqnorm(*operands.view(batch, *values), key, stream, probes)

        found = emit.per_sample(sqnorm, emit.probe_key, *operands.leaves)
        return Prepared(found, tied_sum(emit, axes, gradient))

    def cost(gradient: ParameterGradient, axes: Axes) -> Cost:
        return tied_sketch_cost(gradient, axes, probes)

    return Strategy("hutchinson", is_tied, prepare, cost, SLACK, probes=probes)


@cache
def hutchplusplus(probes: int) -> Strategy:
    """The norm of what lies in a space found by one sketch, exactly, and an estimate of the rest by another."""

    def prepare(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
        operands, own = linear_operands(gradient, axes), streams(axes, gradient)

        def sqnorm(batch: Any, key: Tensor, *values: Tensor) -> Tensor:
            return ops.hutchpp_sqnorm(*operands.view(batch, *values), key, list(own), probes)

        found = emit.per_sample(sqnorm, emit.probe_key, *operands.leaves)
        return Prepared(found, weighted_product(emit, axes, gradient))

    def cost(gradient: ParameterGradient, axes: Axes) -> Cost:
        return sketch_cost(gradient, axes, 4 * probes)

    return Strategy("hutch++", is_linear, prepare, cost, SLACK, probes=probes)
