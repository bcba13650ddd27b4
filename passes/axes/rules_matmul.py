"""Matrix products: contracting the batch on both sides is a reduction point, and the backward of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashdp_compile.passes.axes.domain import CONSTANT, Batched, Reduced, Reject, Site, State
from flashdp_compile.passes.axes.registry import one_reduced, rule
from flashdp_compile.passes.axes.uniform import same_for_all


def contract(site: Site, a: State, b: State, batched: bool, nodes: Sequence[Any]) -> State:
    """a[..., m, k] @ b[..., k, n], with a leading dimension if `batched`; `nodes` are a's and b's."""
    left, right = (a if isinstance(a, Batched) else None), (b if isinstance(b, Batched) else None)
    inner_a, inner_b = (2, 1) if batched else (1, 0)
    contracts = (left is not None and left.dim == inner_a, right is not None and right.dim == inner_b)
    if all(contracts):
        assert left is not None and right is not None
        if (left.outer, left.inner) != (right.outer, right.inner):
            raise Reject(f"it pairs samples of two different orders ({left} and {right})", "keep one order of samples")
        weights = [s.weight for s in (left, right) if s.weight]
        return site.point(weight=weights[0] if len(weights) == 1 else None)
    if any(contracts):
        # the other side is the same for all samples, or misaligned: a sum over samples with constant coefficients
        if left is not None and right is not None:
            raise Reject("it sums over the batch of one side and keeps that of the other", "keep one batch dimension")
        kept = left or right
        assert kept is not None
        same_for_all(site, nodes[0], a, kept.at(inner_a))
        same_for_all(site, nodes[1], b, kept.at(inner_b))
        return site.point(weight=kept.weight)
    if left is not None and right is not None:
        if not (batched and left.dim == 0 and right.dim == 0):
            raise Reject(
                "it multiplies every sample with every other sample (a product over the batch)",
                "contrastive and in-batch losses cannot be trained privately per sample; use pairs within a sample",
            )
        if not left.aligned(right):
            raise Reject(f"it pairs samples of two different orders ({left} and {right})", "keep one order of samples")
    kept = left or right
    assert kept is not None
    if batched and kept.dim == 0:
        same_for_all(site, nodes[0], a, kept)
        same_for_all(site, nodes[1], b, kept)
    return Batched(kept.dim, kept.outer, kept.inner)


@rule("aten.mm.default", "aten.mm.dtype", linear=one_reduced)
def mm(site: Site, a: State, b: State, *dtype: Any) -> State:
    """Rows of samples times a constant keep the axis; contracting it on both sides sums over samples."""
    return contract(site, a, b, False, site.node.args[:2])


@rule("aten.bmm.default", "aten.bmm.dtype", linear=one_reduced)
def bmm(site: Site, a: State, b: State, *dtype: Any) -> State:
    """As mm, for every index of the leading dimension, which may hold the samples itself."""
    return contract(site, a, b, True, site.node.args[:2])


def _add(site: Site, bias: State, result: State, rank: int) -> State:
    if isinstance(bias, Batched):
        moved = bias.at(bias.dim + rank - site.arg_rank(0))
        if isinstance(result, Reduced) or not (isinstance(result, Batched) and moved.aligned(result)):
            raise Reject("it adds values that hold their samples in different places", "align the batch dimensions")
    elif isinstance(result, Reduced):
        raise Reject("it adds a term that does not depend on the samples to a sum over them")
    elif isinstance(result, Batched):
        same_for_all(site, site.node.args[0], bias, result.at(result.dim + site.arg_rank(0) - rank))
    return result


def _onto(site: Site, bias: State, rank: int) -> State:
    """A bias that carries the samples, under a constant product."""
    assert isinstance(bias, Batched)
    axis = Batched(bias.dim + rank - site.arg_rank(0), bias.outer, bias.inner)
    for node, contracted in zip(site.node.args[1:3], (rank - 1, rank - 2), strict=True):
        if axis.dim != contracted:
            same_for_all(site, node, CONSTANT, axis)
    return axis


@rule("aten.addmm.default", "aten.addmm.dtype")
def addmm(site: Site, bias: State, a: State, b: State, *rest: Any, **scale: Any) -> State:
    """A product plus a bias that is constant, or batched in the same way."""
    if not isinstance(a, Batched) and not isinstance(b, Batched):
        return _onto(site, bias, 2)
    return _add(site, bias, contract(site, a, b, False, site.node.args[1:3]), 2)


@rule("aten.baddbmm.default", "aten.baddbmm.dtype")
def baddbmm(site: Site, bias: State, a: State, b: State, *rest: Any, **scale: Any) -> State:
    """A batched product plus a bias that is constant, or batched in the same way."""
    if not isinstance(a, Batched) and not isinstance(b, Batched):
        return _onto(site, bias, 3)
    return _add(site, bias, contract(site, a, b, True, site.node.args[1:3]), 3)


@rule("aten._trilinear")
def trilinear(
    site: Site,
    a: State,
    b: State,
    c: State,
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    dims: Any,
    *_: Any,
) -> State:
    """The sum over `dims` of the product of three tensors, each with new dimensions put in (Bilinear)."""
    placed = []
    for state, new in zip((a, b, c), (expand_a, expand_b, expand_c), strict=True):
        if isinstance(state, Batched):
            dim = state.dim
            for d in sorted(new):
                dim += d <= dim
            placed.append(state.at(dim))
    if any(not p.aligned(placed[0]) for p in placed):
        raise Reject("it multiplies values that hold their samples in different places", "keep one batch dimension")
    for node, state, new in zip(site.node.args, (a, b, c), (expand_a, expand_b, expand_c), strict=False):
        own = [d for d in range(site.arg_rank() + len(expand_a)) if d not in new]
        if placed[0].dim in own:
            same_for_all(site, node, state, placed[0].at(own.index(placed[0].dim)))
    summed = sorted(dims)
    if placed[0].dim in summed:
        weights = [p.weight for p in placed if p.weight]
        return site.point(weight=weights[0] if len(weights) == 1 else None)
    return Batched(placed[0].dim - sum(d < placed[0].dim for d in summed), placed[0].outer, placed[0].inner)
