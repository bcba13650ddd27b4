"""Ops that move elements without changing them: the batch axis is renumbered, split or merged, never cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, size_expression
from flashdp_compile.passes.axes.domain import (
    ZERO,
    Batched,
    Reject,
    Site,
    State,
    quotient,
    same,
)
from flashdp_compile.passes.axes.registry import all_reduced, rule
from flashdp_compile.passes.axes.reshape import reshaped, strides_in_order
from flashdp_compile.passes.axes.uniform import same_for_all


@rule("aten.view.default", "aten._unsafe_view", "aten.reshape", "aten.flatten.using_ints", "prims.reshape", linear=True)
def view(site: Site, x: Batched, *sizes: Any) -> State:
    """Row-major order is kept, so the axis is found again by its stride."""
    return reshaped(site.batch, x, site.arg_shape(), site.shape())


@rule("aten.as_strided", linear=True)
def as_strided(site: Site, x: Batched, *layout: Any) -> State:
    """Reading a contiguous tensor as another contiguous one of the same size is a view."""
    if strides_in_order(site.node):
        return reshaped(site.batch, x, site.arg_shape(), site.shape())
    raise Reject("as_strided reads memory out of the order of the samples", "use view, permute or slicing instead")


@rule("aten.permute", linear=True)
def permute(site: Site, x: Batched, dims: list[int]) -> State:
    """Permuting renumbers the batch dimension."""
    rank = site.arg_rank()
    return x.at([d % rank for d in dims].index(x.dim))


@rule("aten.t", linear=True)
def t(site: Site, x: Batched) -> State:
    """Transposing a matrix swaps its two dimensions."""
    return x.at(1 - x.dim) if site.arg_rank() == 2 else x


@rule("aten.transpose.int", linear=True)
def transpose(site: Site, x: Batched, a: int, b: int) -> State:
    """Transposing renumbers the batch dimension."""
    a, b = a % site.arg_rank(), b % site.arg_rank()
    return x.at({a: b, b: a}.get(x.dim, x.dim))


@rule("aten.expand", linear=True)
def expand(site: Site, x: Batched, *sizes: Any, **options: Any) -> State:
    """New dimensions appear on the left; the batch dimension itself keeps its size (checked by the engine)."""
    return x.at(x.dim + len(site.shape()) - site.arg_rank())


@rule("aten.unsqueeze", linear=True)
def unsqueeze(site: Site, x: Batched, dim: int) -> State:
    """A new dimension shifts those behind it."""
    return x.at(x.dim + (dim % (site.arg_rank() + 1) <= x.dim))


@rule("aten.squeeze", linear=True)
def squeeze(site: Site, x: Batched, dims: Any = None) -> State:
    """Dimensions of size one vanish; a batch of one sample keeps its dimension's meaning through a reshape."""
    return reshaped(site.batch, x, site.arg_shape(), site.shape()) if site.shape() else _vanished()


def _vanished() -> State:
    raise Reject(
        "squeeze removes the batch dimension of a batch of one sample",
        "name the dimensions to squeeze, not the batch",
    )


@rule("aten.slice.Tensor", linear=True)
def slice_(site: Site, x: Batched, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> State:
    """Slicing features keeps the axis. Along the batch only whole runs of B may be taken (as of q, k, v from qkv)."""
    if dim % site.arg_rank() != x.dim:
        return x
    before, after = site.arg_shape()[x.dim], site.shape()[x.dim]
    if step == 1 and same(before, after):
        return x
    outer = quotient(after, site.batch * x.inner)
    if step == 1 and x.outer != 1 and starts_a_run(site, x, start) and outer is not None:
        return replace(x, outer=outer)
    raise Reject("it slices along the batch", "select data before it enters the model")


def starts_a_run(site: Site, x: Batched, start: Any) -> bool:
    """Whether an index along the batch dimension is the first of sample 0's, in one of the outer runs."""
    value = start.meta["val"] if isinstance(start, fx.Node) else start or 0
    return quotient(size_expression(value), site.batch * x.inner) is not None


@rule("aten.select.int", linear=True)
def select(site: Site, x: Batched, dim: int, index: Any) -> State:
    """Selecting one element of a feature dimension drops that dimension."""
    dim %= site.arg_rank()
    if dim == x.dim:
        raise Reject("it selects along the batch", "samples cannot be told apart by their position in the batch")
    return x.at(x.dim - (dim < x.dim))


@rule("aten.unbind.int", linear=True)
def unbind(site: Site, x: Batched, dim: int = 0) -> State:
    """As select, for every index."""
    if dim % site.arg_rank() == x.dim:
        raise Reject(
            "it takes the batch apart, sample by sample",
            "treat the whole batch at once; torch.vmap(f)(x) makes a function of one sample one of all",
        )
    return (select(site, x, dim, 0),) * len(site.node.meta["val"])


@rule("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk", linear=True)
def split(site: Site, x: Batched, sizes: Any, dim: int = 0) -> State:
    """Splitting along features keeps the axis in every piece."""
    pieces = site.node.meta["val"]
    if dim % site.arg_rank() != x.dim:
        return (x,) * len(pieces)
    run = site.batch * x.inner
    outers = [quotient(size_expression(p.shape[x.dim]), run) for p in pieces]
    if x.outer == 1 or any(o is None for o in outers):
        raise Reject("it splits the batch", "split along a feature dimension")
    return tuple(replace(x, outer=o) for o in outers)


@rule("aten.cat", linear=all_reduced)
def cat(site: Site, tensors: list[State], dim: int = 0) -> State:
    """Along another dimension all parts must agree; along the batch their outer factors add up.

    Zeros may fill whole runs of B in either case: the backward of taking one chunk of several.
    """
    dim %= len(site.shape())
    # torch.cat skips the empty 1-D tensor, an old way to start a list
    operands = [(n, s) for n, s in zip(site.node.args[0], tensors, strict=True) if not _legacy_empty(site, n)]
    batched = [s for _, s in operands if isinstance(s, Batched)]
    first = batched[0]
    along = dim == first.dim
    if any(not s.aligned(replace(first, outer=s.outer) if along else first) for s in batched):
        raise Reject("it joins values that hold their samples in different places", "align the batch dimensions first")
    constant_is_zero = all(s == ZERO for _, s in operands if not isinstance(s, Batched))
    weights = {s.weight for s in batched}
    weight = weights.pop() if constant_is_zero and len(weights) == 1 else None
    if not along:
        for n, s in operands:
            same_for_all(site, n, s, first)
        return replace(first, weight=weight)
    outers = [quotient(site.shape(n)[dim], site.batch * first.inner) for n, _ in operands]
    if not constant_is_zero or None in outers:
        raise Reject("it appends to the batch", "build the whole batch before it enters the model")
    return replace(first, outer=sum(outers), weight=weight)


def _legacy_empty(site: Site, node: Any) -> bool:
    return site.shape(node) == [0] and len(site.shape()) > 1


@rule("aten.stack", linear=all_reduced)
def stack(site: Site, tensors: list[State], dim: int = 0) -> State:
    """A new dimension among equal ones."""
    batched = [s for s in tensors if isinstance(s, Batched)]
    if any(s != batched[0] for s in batched):
        raise Reject("it stacks values that hold their samples in different places", "align the batch dimensions first")
    for n, s in zip(site.node.args[0], tensors, strict=True):
        same_for_all(site, n, s, batched[0])
    return batched[0].at(batched[0].dim + (dim % len(site.shape()) <= batched[0].dim))


def _pads_zeros(x: Any, padding: list[Any], value: Any = 0) -> bool:
    return value == 0


@rule("aten.constant_pad_nd", linear=_pads_zeros)
def pad(site: Site, x: Batched, padding: list[Any], value: Any = 0) -> State:
    """Padding a feature dimension keeps the axis; padding the batch would add samples."""
    position = 2 * (site.arg_rank() - 1 - x.dim)
    if any(p != 0 for p in padding[position : position + 2]):
        raise Reject("it pads the batch", "pad features, or build the whole batch before it enters the model")
    return x if value == 0 else replace(x, weight=None)


@rule("aten.flip", "prims.rev", linear=True)
def flip(site: Site, x: Batched, dims: list[int]) -> State:
    """Reversing features keeps the axis; reversing the batch pairs different samples."""
    if x.dim in [d % site.arg_rank() for d in dims]:
        raise Reject("it reverses the batch", "flip along a feature dimension")
    return x


@rule("aten.roll", linear=True)
def roll(site: Site, x: Batched, shifts: list[int], dims: tuple[int, ...] | list[int] = ()) -> State:
    """Rolling features keeps the axis; rolling the batch, or the flattened tensor, pairs different samples."""
    if not dims or x.dim in [d % site.arg_rank() for d in dims]:
        raise Reject("it rolls the batch", "roll along a feature dimension")
    return x


@rule("aten.repeat", linear=True)
def repeat(site: Site, x: Batched, repeats: list[Any]) -> State:
    """Repeating features keeps the axis; repeating the batch k times makes k its outer factor."""
    new = len(repeats) - site.arg_rank()
    return replace(x, dim=x.dim + new, outer=x.outer * repeats[x.dim + new])


@rule("aten.unfold", linear=True)
def unfold(site: Site, x: Batched, dim: int, size: Any, step: Any) -> State:
    """Windows over a feature dimension; the window becomes the last dimension."""
    if dim % site.arg_rank() == x.dim:
        raise Reject("it slides windows over the batch", "unfold a feature dimension")
    return x


@rule("aten.view_as_real", linear=True)
def view_as_real(site: Site, x: Batched) -> State:
    """A last dimension of real and imaginary part is added."""
    return x


@rule("aten.view.dtype")
def view_as_dtype(site: Site, x: Batched, dtype: torch.dtype) -> State:
    """The same bits: the last dimension may grow or shrink. Weights stay factors only where complex becomes real."""
    if x.dim == site.arg_rank() - 1:
        raise Reject("it may read the batch in pieces of other sizes", "keep the batch in front")
    value = site.node.args[0].meta["val"].dtype
    pairs = {value, dtype} in ({torch.complex64, torch.float32}, {torch.complex128, torch.float64})
    return x if pairs else replace(x, weight=None)


@rule("aten.view_as_complex", linear=True)
def view_as_complex(site: Site, x: Batched) -> State:
    """The last dimension, of real and imaginary part, vanishes."""
    if x.dim == site.arg_rank() - 1:
        raise Reject("it reads the batch as real and imaginary parts", "keep one batch dimension")
    return x


@rule("aten.diagonal", linear=True)
def diagonal(site: Site, x: Batched, offset: int = 0, dim1: int = 0, dim2: int = 1) -> State:
    """The diagonal of two feature dimensions becomes the last dimension."""
    pair = {dim1 % site.arg_rank(), dim2 % site.arg_rank()}
    if x.dim in pair:
        raise Reject("it takes a diagonal through the batch", "use two feature dimensions")
    return x.at(x.dim - sum(d < x.dim for d in pair))


@rule("aten.triu", "aten.tril", linear=True)
def triangle(site: Site, x: Batched, diagonal: int = 0) -> State:
    """Zeroing a triangle of the last two dimensions; over the batch it depends on the position in it."""
    if x.dim >= site.arg_rank() - 2:
        raise Reject("it takes a triangle through the batch", "use two feature dimensions")
    return x


def is_structural(op: Any) -> bool:
    """Whether an op only moves elements, so that a zero constant stays zero."""
    return isinstance(op, OpOverload) and op.namespace in ("aten", "prims") and op._opname in _STRUCTURAL


_STRUCTURAL = frozenset(
    "view _unsafe_view reshape permute t transpose expand unsqueeze squeeze slice select split clone alias "
    "convert_element_type _to_copy detach neg flip rev repeat".split()
)
