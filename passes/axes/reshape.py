"""Where the samples are after a reshape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import size_expression
from flashdp_compile.passes.axes.domain import Batched, Reject, Size, product, quotient, same


def reshaped(batch: Size, x: Batched, old: list[Size], new: list[Size]) -> Batched:
    """The axis of `x` after a reshape: the new dimension that still has whole samples in its strides.

    In the flattened tensor sample b owns the elements whose index, divided by the stride S of one step along the
    batch, is b modulo B. A new dimension holds the axis if S is a whole multiple of that dimension's stride and the
    product of everything outside of the batch is unchanged.
    """
    stride = x.inner * product(old[x.dim + 1 :])
    outside = product(old[: x.dim]) * x.outer
    for dim, size in enumerate(new):
        inner = quotient(stride, product(new[dim + 1 :]))
        outer = None if inner is None else quotient(size, batch * inner)
        if inner is None or outer is None:
            continue
        if same(product(new[:dim]) * outer, outside):
            return replace(x, dim=dim, outer=outer, inner=inner)
    raise Reject(
        f"reshaping {_sizes(old)} to {_sizes(new)} cuts the batch axis ({x})",
        "reshape within a sample only, and keep the batch a whole dimension or factor of one",
    )


def _sizes(shape: list[Size]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def strides_in_order(node: fx.Node) -> bool:
    """Whether an as_strided reads all of a contiguous tensor as another contiguous one, as a view would."""
    source, result = node.args[0].meta["val"], node.meta["val"]
    sizes = [product([size_expression(s) for s in value.shape]) for value in (source, result)]
    offset = node.args[3] if len(node.args) > 3 else None
    return source.is_contiguous() and result.is_contiguous() and begins_alike(source, offset) and same(*sizes)


def begins_alike(source: torch.Tensor, offset: Any) -> bool:
    """Whether an offset into the storage is where the source begins, which may be later than its storage does."""
    return offset is None or offset == 0 and same(size_expression(source.storage_offset()), 0)
