"""Where the samples are after a reshape."""

from __future__ import annotations

from dataclasses import replace

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
