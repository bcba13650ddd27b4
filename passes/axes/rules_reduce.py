"""Sums and other statistics: over features they keep the batch axis, over the batch a sum is a reduction point."""

from __future__ import annotations

from typing import Any

from flashdp_compile.passes.axes.domain import Batched, Mixed, Reject, Site, State
from flashdp_compile.passes.axes.registry import first_reduced, linear, rule
from flashdp_compile.passes.axes.uniform import same_for_all


def _dims(dims: Any, rank: int) -> set[int]:
    """The dimensions that an op's `dim` argument names; all of them for None and for an empty list."""
    if dims is None or dims == [] or dims == ():
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)}


def _kept(site: Site, x: Batched, dims: set[int], keepdim: bool) -> Batched:
    return Batched(x.dim if keepdim else x.dim - sum(d < x.dim for d in dims), x.outer, x.inner, None)


@rule("aten.sum.dim_IntList", "aten.sum.default", "aten.mean.dim", "aten.mean.default", linear=first_reduced)
def sum_(site: Site, x: Batched, dims: Any = None, keepdim: bool = False, **options: Any) -> State:
    """A sum over the batch is a reduction point; over features it renumbers dimensions and keeps weights."""
    summed = _dims(dims, site.arg_rank())
    if x.dim in summed:
        return site.point(weight=x.weight)
    kept = _kept(site, x, summed, keepdim)
    return Batched(kept.dim, kept.outer, kept.inner, x.weight)


def _statistic(site: Site, x: Batched, dims: Any, keepdim: bool) -> State:
    reduced = _dims(dims, site.arg_rank())
    if x.dim in reduced:
        return Mixed(f"{site.node.target} is taken over the batch")
    return _kept(site, x, reduced, keepdim)


@rule(
    "aten.amax",
    "aten.amin",
    "aten.any.dim",
    "aten.any.dims",
    "aten.any.default",
    "aten.all.dim",
    "aten.all.dims",
    "aten.all.default",
    "aten.prod.dim_int",
    "aten.prod.default",
    "aten.argmax",
    "aten.argmin",
    "aten.logsumexp",
    "aten.count_nonzero.dim_IntList",
    "aten.nansum",
    "aten.max.default",
    "aten.min.default",
)
def statistic(site: Site, x: Batched, dims: Any = None, keepdim: bool = False, **options: Any) -> State:
    """A statistic over features keeps the axis; over the batch it mixes samples."""
    return _statistic(site, x, dims, keepdim)


@rule(
    "aten.max.dim", "aten.min.dim", "aten.median.dim", "aten.nanmedian.dim", "aten.mode", "aten.cummax", "aten.cummin"
)
def value_and_index(site: Site, x: Batched, dim: int = -1, keepdim: bool | None = None, **options: Any) -> Any:
    """A statistic with its index; the cumulative ones keep every dimension."""
    keep = bool(keepdim) or "cum" in str(site.node.target)
    state = _statistic(site, x, dim, keep)
    return state, state


@rule("aten.var.correction", "aten.std.correction", "prims.var")
def variance(site: Site, x: Batched, dims: Any = None, *rest: Any, keepdim: bool = False, **options: Any) -> State:
    """A variance over features keeps the axis; over the batch it mixes samples."""
    return _statistic(site, x, dims, keepdim)


@rule("aten.var_mean.correction")
def variance_and_mean(site: Site, x: Batched, dims: Any = None, *, keepdim: bool = False, **options: Any) -> Any:
    """As the variance."""
    state = _statistic(site, x, dims, keepdim)
    return state, state


@rule("aten.linalg_vector_norm")
def vector_norm(
    site: Site, x: Batched, order: Any = 2, dims: Any = None, keepdim: bool = False, **options: Any
) -> State:
    """A norm over features keeps the axis; over the batch it mixes samples."""
    return _statistic(site, x, dims, keepdim)


def _along(site: Site, x: Batched, dim: Any) -> Batched:
    if dim is None or dim % site.arg_rank() == x.dim:
        raise Reject(f"{site.node.target} runs along the batch", "apply it along a feature dimension")
    return Batched(x.dim, x.outer, x.inner)


@rule(
    "aten._softmax",
    "aten._log_softmax",
    "aten._safe_softmax",
    "aten.softmax.int",
    "aten.log_softmax.int",
    "aten.cumsum",
    "aten.cumprod",
    "aten.logcumsumexp",
    "aten.argsort",
)
def along_dimension(site: Site, x: Batched, dim: Any = None, *rest: Any, **options: Any) -> State:
    """Running along the batch would tie every sample to others."""
    return _along(site, x, dim)


linear(first_reduced, "aten.cumsum.default")


@rule("aten.glu")
def glu(site: Site, x: Batched, dim: int = -1) -> State:
    """One half of a feature dimension is the gate of the other."""
    return _along(site, x, dim)


@rule("aten.glu_backward")
def glu_backward(site: Site, grad: Any, x: Any, dim: int) -> State:
    """As the forward op: the gradient has half the size along the dimension that is halved."""
    return _both_along(site, (grad, x), dim)


@rule("aten._softmax_backward_data", "aten._log_softmax_backward_data")
def softmax_backward(site: Site, grad: Any, output: Any, dim: int, dtype: Any) -> State:
    """As the forward op: both operands hold the samples in the same place, off the dimension that is normalised."""
    return _both_along(site, (grad, output), dim)


def _both_along(site: Site, operands: tuple[Any, Any], dim: int) -> State:
    """The first two operands hold the samples in the same place, off the dimension."""
    states = [s for s in operands if isinstance(s, Batched)]
    if any(not s.aligned(states[0]) for s in states):
        raise Reject("its operands hold their samples in different places")
    for node, state in zip(site.node.args, operands, strict=False):
        same_for_all(site, node, state, states[0])
    return _along(site, states[0], dim)


@rule("aten.sort.default", "aten.sort.stable", "aten.topk", "aten.kthvalue")
def ordered(site: Site, x: Batched, *rest: Any, **options: Any) -> Any:
    """Ordering along features keeps the axis; along the batch it compares samples."""
    names = [a.name for a in site.node.target._schema.arguments]
    bound = dict(zip(names, site.node.args, strict=False)) | dict(site.node.kwargs)
    dim = bound.get("dim", -1) % site.arg_rank()
    state = _along(site, x, dim)
    if "kthvalue" in str(site.node.target) and not bound.get("keepdim", False):
        state = state.at(state.dim - (dim < state.dim))
    return state, state
