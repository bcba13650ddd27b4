"""Linear layers: the norm from two Gram matrices, or from the product tile by tile, or with the product kept.

Sample i has x [T, d] and g [T, p]; its gradient is x^T g. Formulas and costs: docs/how-it-works.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashdp_compile.kernels.guard import SLACK
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import Cost, gram_cost, outer_cost, store_cost
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Prepared, Strategy, Together
from flashdp_compile.passes.strategies.operands import linear_operands, linear_terms, relabelled, same_relabelling

ops = torch.ops.flashdp


def is_linear(gradient: ParameterGradient, axes: Axes) -> bool:
    """Whether a gradient is one matrix product, or several of one layout (a weight that is used several times)."""
    terms = linear_terms(gradient)
    return bool(terms) and len(terms) == len(gradient.terms or ()) and same_relabelling(terms)


def weighted_product(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Callable[[fx.Node], fx.Node]:
    """The second half of every strategy that keeps the factors: one product with the weights in it."""
    operands = linear_operands(gradient, axes)

    def weighted(batch: Any, *given: Tensor) -> Tensor:
        *values, weights = given
        x, g = operands.view(batch, *values)
        return relabelled(ops.weighted_matmul(x, g, weights), operands.relabelling, gradient.shape)

    return lambda weights: emit.per_sample(weighted, *operands.leaves, weights)


def _prepare(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Emitter, Axes, ParameterGradient], Prepared]:
    def prepare(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
        operands = linear_operands(gradient, axes)
        sqnorm = emit.per_sample(lambda batch, *values: norm(*operands.view(batch, *values)), *operands.leaves)
        return Prepared(sqnorm, weighted_product(emit, axes, gradient))

    return prepare


def _prepare_store(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
    operands = linear_operands(gradient, axes)
    product, sqnorm = emit.per_sample(
        lambda batch, *values: ops.outer_store(*operands.view(batch, *values)), *operands.leaves
    )

    def weighted(product: Tensor, weights: Tensor) -> Tensor:
        return relabelled(ops.product_sum(product, weights), operands.relabelling, gradient.shape)

    def finish(weights: fx.Node) -> fx.Node:
        return emit(weighted, product, weights)

    return Prepared(sqnorm, finish)


def _try_store(x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    product, sqnorm = ops.outer_store(x, g)
    return sqnorm, ops.product_sum(product, weights)


def _of_factors(
    name: str,
    norm: Callable[[Tensor, Tensor], Tensor],
    cost: Callable[..., Cost],
    slack: float,
    together: Together | None = None,
) -> Strategy:
    """A strategy that keeps the factors until the weights are there."""

    def trial(x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x, g), ops.weighted_matmul(x, g, weights)

    return Strategy(name, is_linear, _prepare(norm), cost, slack, trial, together)


def _one_gram_matrix(emit: Emitter, axes: Axes, gradients: Sequence[ParameterGradient]) -> Any:
    """The squared norms add up to <A, sum_l G_l>, where A is the Gram matrix of the shared operand and G_l those of the
    others: one kernel computes A once for all of them."""
    return (lambda x, gs: ops.gram_sqnorm(x, gs, [False] * len(gs))), ()


GRAM = _of_factors("gram", lambda x, g: ops.gram_sqnorm(x, [g], [False]), gram_cost, SLACK, _one_gram_matrix)
OUTER = _of_factors("outer", lambda x, g: ops.outer_sqnorm(x, g), outer_cost, 2.0**-16)
STORE = Strategy("store", is_linear, _prepare_store, store_cost, 2.0**-16, _try_store)
