"""Writing a part of a tensor at a fixed place: the backward of slicing, selecting and taking a diagonal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from flashdp_compile.compat import size_expression
from flashdp_compile.passes.axes.domain import ZERO, Batched, Reject, Site, State, product, quotient, same
from flashdp_compile.passes.axes.registry import all_reduced, rule
from flashdp_compile.passes.axes.reshape import begins_alike, reshaped
from flashdp_compile.passes.axes.rules_views import starts_a_run
from flashdp_compile.passes.axes.uniform import same_for_all


@rule("aten.slice_scatter", linear=all_reduced)
def slice_scatter(
    site: Site, x: State, source: State, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> State:
    """Writing a slice of features keeps the axis that both sides share; along the batch, whole runs of B into zeros."""
    dim %= len(site.shape())
    whole = same(site.shape()[dim], site.arg_shape(1)[dim])
    if isinstance(source, Batched) and source.dim == dim and step == 1 and starts_a_run(site, source, start):
        outer = quotient(site.shape()[dim], site.batch * source.inner)
        if outer is not None and (x == ZERO or isinstance(x, Batched)):
            source, whole = replace(source, outer=outer), True
    return _scatter(site, x, source, () if whole else (dim,), list(range(len(site.shape()))))


@rule("aten.select_scatter", linear=all_reduced)
def select_scatter(site: Site, x: State, source: State, dim: int, index: Any) -> State:
    """Writing one element of a feature dimension keeps the axis that both sides share."""
    dim %= len(site.shape())
    return _scatter(site, x, source, (dim,), [d for d in range(len(site.shape())) if d != dim])


@rule("aten.diagonal_scatter", linear=all_reduced)
def diagonal_scatter(site: Site, x: State, source: State, offset: int = 0, dim1: int = 0, dim2: int = 1) -> State:
    """Writing the diagonal of two feature dimensions; in the source it is the last dimension."""
    pair = (dim1 % len(site.shape()), dim2 % len(site.shape()))
    return _scatter(site, x, source, pair, [d for d in range(len(site.shape())) if d not in pair] + [pair[0]])


@rule("aten.as_strided_scatter")
def as_strided_scatter(site: Site, x: State, source: State, sizes: Any, strides: Any, offset: Any = None) -> State:
    """Writing all of a contiguous tensor in its own order is a view of what is written: nothing of the tensor stays."""
    tensor = site.node.args[0].meta["val"]
    whole = tensor.is_contiguous() and same(product(site.shape()), product(site.arg_shape(1)))
    ordered = begins_alike(tensor, offset) and _in_order(site.arg_shape(1), strides)
    if isinstance(source, Batched) and whole and ordered:
        return reshaped(site.batch, source, site.arg_shape(1), site.shape())
    raise Reject("as_strided_scatter writes memory out of the order of the samples", "write into a slice instead")


def _in_order(shape: list[Any], strides: Any) -> bool:
    """Whether the strides are those of a contiguous tensor; the stride of a dimension of size one is of no matter."""
    steps = [size_expression(s.meta["val"] if isinstance(s, fx.Node) else s) for s in strides]
    return all(
        same(size, 1) or same(step, product(shape[d + 1 :]))
        for d, (size, step) in enumerate(zip(shape, steps, strict=True))
    )


def _scatter(site: Site, x: State, source: State, along: tuple[int, ...], places: list[int]) -> State:
    """`along` are the dimensions of which a part is written, `places` where those of the source lie in the result."""
    lifted = source.at(places[source.dim]) if isinstance(source, Batched) else source
    parts = [s for s in (x, lifted) if isinstance(s, Batched)]
    if any(p.dim in along for p in parts):
        raise Reject("it writes along the batch", "write along a feature dimension")
    if any(not p.aligned(parts[0]) for p in parts):
        raise Reject("it writes samples over other samples", "write along a feature dimension")
    same_for_all(site, site.node.args[0], x, parts[0])
    if parts[0].dim in places:
        same_for_all(site, site.node.args[1], source, parts[0].at(places.index(parts[0].dim)))
    weights = {p.weight for p in parts}
    kept = (
        weights.pop() if len(weights) == 1 and all(s == ZERO or isinstance(s, Batched) for s in (x, source)) else None
    )
    return replace(parts[0], weight=kept)
