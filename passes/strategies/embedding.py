"""Embeddings, alone and tied to the head of a language model.

Alone: the rows of equal ids are added up, then squared. Tied, the table also receives the gradient of a linear layer,
so |e + l|^2 = |e|^2 + |l|^2 + 2 <e, l>, and the cross term only needs the head's gradient at the input's ids (Ding et
al. 2024, phantom clipping). Where the head's gradients of all samples are stored, it is read off them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flashdp_compile.kernels.guard import SLACK, gamma, guarded
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import embedding_cost, tied_cost, tied_store_cost
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Prepared, Strategy, widened
from flashdp_compile.passes.strategies.operands import (
    embedding_operands,
    embedding_terms,
    is_embedding,
    linear_operands,
    linear_terms,
    relabelled,
    same_relabelling,
)

ops = torch.ops.flashdp


def _all_embeddings(gradient: ParameterGradient, axes: Axes) -> bool:
    terms = embedding_terms(gradient)
    return bool(terms) and all(not t.relabelling and is_embedding(t.point.node, axes) for t in terms)


def _only_embedding(gradient: ParameterGradient, axes: Axes) -> bool:
    return _all_embeddings(gradient, axes) and len(embedding_terms(gradient)) == len(gradient.terms or ())


def is_tied(gradient: ParameterGradient, axes: Axes) -> bool:
    lookups, products = embedding_terms(gradient), linear_terms(gradient)
    whole = len(lookups) + len(products) == len(gradient.terms or ())
    return (
        whole
        and bool(products)
        and _all_embeddings(gradient, axes)
        and same_relabelling(products)
        and products[0].relabelling in ((), (("permute", (1, 0)),))
    )


def _prepare_embedding(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
    operands = embedding_operands(gradient, axes)
    rows = gradient.shape[0]

    def weighted(batch: Any, *given: Tensor) -> Tensor:
        *values, weights = given
        return ops.embedding_sum(*operands.view(batch, *values), weights, rows)

    return Prepared(
        emit.per_sample(lambda batch, *values: ops.embedding_sqnorm(*operands.view(batch, *values)), *operands.leaves),
        lambda weights: emit.per_sample(weighted, *operands.leaves, weights),
    )


def _lengths(x: Tensor) -> Tensor:
    """[B, T, d] -> [B, T], the norm of every row."""
    return widened(x).square().sum(-1).sqrt()


def _rows(ids: Tensor, ge: Tensor) -> Tensor:
    """[B]: the lengths of all rows that are looked up, together."""
    return torch.where(ids >= 0, _lengths(ge), 0).sum(1)


def _guarded(est: Tensor, R: Tensor, ids: Tensor, shape: Sequence[Any]) -> Tensor:
    """|e|^2 + |l|^2 + 2 <e, l> with the guard of kernels/guard.py as a whole, since e and l may cancel.

    Sums run over V, over d and over the lookups of one id: these are counted, for their number may be symbolic.
    """
    chain = sum(shape)
    longer = (16 + (chain + (ids >= 0).sum(1)).to(est.dtype).sqrt()) / (16 + math.sqrt(chain))
    return guarded(est, gamma(est.dtype, chain) * (R * longer.sqrt()).square())


@dataclass(frozen=True)
class TiedOperands:
    """Graph values that a tied table's gradient is made of; `view(B, *values)` gives ids [B, T] and ge [B, T, d] of the
    embedding, x [B, S, d] and gl [B, S, V] of the head."""

    leaves: tuple[fx.Node, ...]
    view: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def tied_operands(gradient: ParameterGradient, axes: Axes) -> TiedOperands:
    """What a table that is embedding and head receives its gradient from."""
    lookups, products = embedding_operands(gradient, axes), linear_operands(gradient, axes)
    count = len(lookups.leaves)

    def view(batch: Any, *values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left, right = products.view(batch, *values[count:])
        gl, x = (left, right) if not products.relabelling else (right, left)
        return *lookups.view(batch, *values[:count]), x, gl

    return TiedOperands((*lookups.leaves, *products.leaves), view)


def tied_sum(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Callable[[fx.Node], fx.Node]:
    """The second half of every strategy for a tied table."""
    lookups, products = embedding_operands(gradient, axes), linear_operands(gradient, axes)
    shape, count = gradient.shape, len(lookups.leaves)

    def weighted(batch: Any, *given: Tensor) -> Tensor:
        *values, weights = given
        embedded = ops.embedding_sum(*lookups.view(batch, *values[:count]), weights, shape[0])
        product = ops.weighted_matmul(*products.view(batch, *values[count:]), weights)
        return embedded + relabelled(product, products.relabelling, shape)

    return lambda weights: emit.per_sample(weighted, *lookups.leaves, *products.leaves, weights)


def tied_sqnorm(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor) -> Tensor:
    """|e + l|^2 [B] of the lookups' gradients e and the head's l.

    ids [B, T], ge [B, T, d], x [B, S, d], gl [B, S, V].
    """
    own = ops.embedding_sqnorm(ids, ge) + ops.gram_sqnorm(x, [gl], [False])
    est = own + 2 * ops.tied_cross(ids, ge, x, gl)
    return _guarded(est, _rows(ids, ge) + (_lengths(x) * _lengths(gl)).sum(1), ids, (gl.shape[2], x.shape[2]))


def _prepare_tied(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
    operands = tied_operands(gradient, axes)
    sqnorm = emit.per_sample(lambda batch, *values: tied_sqnorm(*operands.view(batch, *values)), *operands.leaves)
    return Prepared(sqnorm, tied_sum(emit, axes, gradient))


def stored_tied_sqnorm(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor) -> tuple[Tensor, Tensor]:
    """The head's gradients l of all samples [B, V, d], as they are stored, and |e + l|^2 [B] with those e of lookups.

    ids [B, T], ge [B, T, d], x [B, S, d], gl [B, S, V].

    Where e and l cancel, what is off by little is off by much of the sum. With R the lengths of all rows of e together:
    |e|^2 by 2 gamma R |e| at most (kernels/guard.py), |l|^2 by gamma |l|^2, <e, l> by gamma R |l|.
    """
    product, head = ops.outer_store(gl, x)
    table = ops.embedding_sqnorm(ids, ge)
    est = table + head + 2 * ops.stored_cross(ids, ge, product)
    own = table.sqrt() + head.sqrt()
    return product, _guarded(est, (own * (own + 2 * _rows(ids, ge))).sqrt(), ids, product.shape[1:])


def _prepare_tied_store(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
    operands, lookups, rows = tied_operands(gradient, axes), embedding_operands(gradient, axes), gradient.shape[0]

    def weighted(batch: Any, *given: Tensor) -> Tensor:
        *values, product, weights = given
        return ops.embedding_sum(*lookups.view(batch, *values), weights, rows) + ops.product_sum(product, weights)

    product, sqnorm = emit.per_sample(
        lambda batch, *values: stored_tied_sqnorm(*operands.view(batch, *values)), *operands.leaves
    )
    return Prepared(sqnorm, lambda weights: emit.per_sample(weighted, *lookups.leaves, product, weights))


EMBEDDING = Strategy("gram", _only_embedding, _prepare_embedding, embedding_cost, slack=SLACK)
TIED = Strategy("gram", is_tied, _prepare_tied, tied_cost, slack=SLACK)
TIED_STORE = Strategy("store", is_tied, _prepare_tied_store, tied_store_cost, slack=SLACK)
