"""Elementwise ops: every operand must hold the samples in the same place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flashdp_compile.passes.axes.domain import CONSTANT, ZERO, Batched, Constant, Reduced, Reject, Site, State
from flashdp_compile.passes.axes.registry import first_reduced, linear, no_data, one_reduced, rule
from flashdp_compile.passes.axes.uniform import same_for_all

_COPIES = (
    "aten.clone",
    "aten.alias",
    "aten.detach",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten._to_copy",
    "prims.convert_element_type",
    "prims.view_of",
    "prims.device_put",
    "aten.contiguous",
)
_CONJUGATES = ("aten._conj", "aten.conj_physical", "aten.resolve_conj", "aten._neg_view", "aten.resolve_neg")


def broadcast(site: Site, *operands: Any) -> State:
    """The common batch axis of operands that are broadcast from the right; no weight."""
    rank = len(site.shape())
    result: Batched | None = None
    for node, state in operands_with_states(site, operands):
        if not isinstance(state, Batched):
            continue
        moved = Batched(state.dim + rank - len(site.shape(node)), state.outer, state.inner)
        if result is not None and moved != result:
            raise Reject(
                f"it combines values that hold their samples in different places ({result} and {moved})",
                "keep the batch in one dimension; a product or sum of two samples cannot be trained privately",
            )
        result = moved
    for node, state in operands_with_states(site, operands) if result is not None else ():
        same_for_all(site, node, state, result.at(result.dim + len(site.shape(node)) - rank))
    assert result is not None, "rules are asked only when an operand carries samples"
    return result


def operands_with_states(site: Site, *operands: Any) -> list[tuple[fx.Node, State]]:
    """The tensor operands of a node, each with its state; `operands` are all arguments that its rule was given."""
    return list(zip(_operand_nodes(site.node), _states(operands), strict=True))


def _operand_nodes(node: fx.Node) -> list[fx.Node]:
    """The tensor operands in the order of the arguments, repeated ones too."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if isinstance(n.meta.get("val"), torch.Tensor)]


def _states(values: Any) -> list[State]:
    if isinstance(values, (list, tuple)):
        return [s for v in values for s in _states(v)]
    if isinstance(values, dict):
        return [s for v in values.values() for s in _states(v)]
    return [values] if isinstance(values, (Constant, Batched, Reduced)) else []


@rule(
    "aten.add.Tensor",
    "aten.dropout",
    "aten.polar",
    "aten.complex",
    "aten.rsub",
    "aten.pow",
    "aten.masked_fill",
)
def pointwise(site: Site, *operands: Any, **options: Any) -> Any:
    """An elementwise op keeps the batch axis. Every op that torch tags as pointwise has this rule."""
    state, results = broadcast(site, operands, options), site.node.meta["val"]
    return (state,) * len(results) if isinstance(results, (tuple, list)) else state


def _source_reduced(overwritten: Any, source: Any, *rest: Any, **options: Any) -> bool:
    return isinstance(source, Reduced)


@rule("aten.copy", linear=_source_reduced)
def overwrite(site: Site, x: State, source: State, *rest: Any) -> State:
    """What is overwritten lends its shape only."""
    if not isinstance(source, Batched):
        return CONSTANT
    return Batched(source.dim + site.arg_rank(0) - site.arg_rank(1), source.outer, source.inner)


@rule("aten.bucketize.Tensor")
def bucketize(site: Site, x: State, boundaries: State, **options: Any) -> State:
    """Each value is placed among constant boundaries."""
    if isinstance(boundaries, Batched):
        raise Reject("its boundaries are samples", "use boundaries that were fixed before this batch")
    assert isinstance(x, Batched)
    return Batched(x.dim, x.outer, x.inner)


@rule("aten.searchsorted.Tensor")
def searchsorted(site: Site, boundaries: State, x: State, *, sorter: Any = None, **options: Any) -> State:
    """Each row of values is placed in the row of boundaries with the same number, or in the only one."""
    operands = operands_with_states(site, boundaries, x, sorter)
    if any(isinstance(state, Batched) and state.dim == len(site.shape(node)) - 1 for node, state in operands):
        raise Reject("it searches along the batch", "search a feature dimension")
    if site.arg_rank(0) == 1:
        assert isinstance(x, Batched)
        return Batched(x.dim, x.outer, x.inner)
    return broadcast(site, boundaries, x, sorter)


@rule(*_COPIES, *_CONJUGATES, linear=True)
def copy(site: Site, x: Batched, *rest: Any, **options: Any) -> State:
    """A copy holds what its source holds."""
    return x


@rule("aten.mul.Tensor", "aten.mul.Scalar", "prims.mul")
def multiply(site: Site, x: Any, y: Any) -> State:
    """A product with clip weights is weighted by them; two factors of weights are no sanctioned weighting."""
    weights = [s.weight for s in (x, y) if isinstance(s, Batched) and s.weight]
    result = broadcast(site, x, y)
    return Batched(result.dim, result.outer, result.inner, weights[0] if len(weights) == 1 else None)


@rule("aten.where.self")
def where(site: Site, condition: State, x: State, y: State) -> State:
    """Replacing elements by zero keeps a weighted value weighted: samples that are left out contribute nothing."""
    result = broadcast(site, condition, x, y)
    weights = {s.weight for s in (x, y) if s != ZERO and isinstance(s, Batched)}
    only_weighted = all(s == ZERO or isinstance(s, Batched) for s in (x, y)) and len(weights) == 1
    return Batched(result.dim, result.outer, result.inner, weights.pop() if only_weighted else None)


no_data(
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.empty_like",
    "aten.rand_like",
    "aten.randn_like",
    "aten.uniform",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.sym_size",
    "aten.sym_stride",
    "aten.sym_numel",
    "aten.sym_storage_offset",
)


@rule("aten.native_dropout")
def native_dropout(site: Site, x: Batched, *rest: Any) -> tuple[State, State]:
    """The mask is drawn elementwise and belongs to the sample it is drawn for."""
    return x, x


def _sum_is_linear(*states: Any, alpha: Any = 1) -> bool:
    """A sum is linear when every term is a batch sum or zero; a term without samples would make it affine."""
    return all(isinstance(s, Reduced) or s == ZERO for s in states)


def _fma_is_linear(a: Any, b: Any, c: Any) -> bool:
    product_reduced = sum(isinstance(s, Reduced) for s in (a, b))
    return product_reduced <= 1 and _sum_is_linear(c) and (product_reduced == 1 or ZERO in (a, b))


@rule("prims.fma", linear=_fma_is_linear)
def fused_multiply_add(site: Site, a: Any, b: Any, c: Any) -> State:
    """a * b + c in one op."""
    return broadcast(site, a, b, c)


def _where_is_linear(condition: Any, x: Any, y: Any) -> bool:
    return not isinstance(condition, Reduced) and _sum_is_linear(x, y)


linear(_sum_is_linear, "aten.add.Tensor", "aten.sub.Tensor")
linear(one_reduced, "aten.mul.Tensor", "aten.mul.Scalar")
linear(first_reduced, "aten.div.Tensor", "aten.div.Scalar", "aten.neg.default")
linear(_where_is_linear, "aten.where.self")
if hasattr(torch.ops.aten, "_weight_norm_interface_backward"):
    linear(first_reduced, "aten._weight_norm_interface_backward.default")
