"""Takes convolutions apart whose windows do not overlap: the gradient of their filters is that of a linear layer.

A vision transformer cuts images into patches by a convolution that moves as far as it reaches, and filters of one pixel
mix channels in most other networks for images. For a sample with patches x [T, C k k] and the gradients g [T, p] of
what the filters made of them, the gradient of the filters is g^T x. As a matrix product its norm costs less than
writing it down for every sample, and it is computed in the dtype of its operands instead of float32.

The gradient of the input, whose windows are all alike to a library, stays with the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from flashdp_compile.compat import argument
from flashdp_compile.passes.apart.take_apart import TakeApart
from flashdp_compile.passes.nodes import per_dimension

aten = torch.ops.aten


def take_patches_apart(graph: fx.Graph) -> int:
    """Replaces the backward of every such convolution by its formula, in place; returns how many."""
    found = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    convolutions = [n for n in found if _is_of_patches(n)]
    take_apart = TakeApart()
    for convolution in convolutions:
        take_apart(convolution, convolution_backward)
    return len(convolutions)


def _is_of_patches(node: fx.Node) -> bool:
    """One group of filters, each of whose elements meets an element of the input once at most, without padding."""
    weight = argument(node, "weight").meta["val"]
    names = ("stride", "padding", "dilation")
    stride, padding, dilation = (per_dimension(argument(node, name), weight.dim() - 2) for name in names)
    windows = zip(weight.shape[2:], stride, padding, dilation, strict=True)
    apart = all(p == 0 and (k == 1 or (k == s and d == 1)) for k, s, p, d in windows)
    alone = argument(node, "groups") == 1 and not argument(node, "transposed")
    return apart and alone and argument(node, "output_mask")[1]


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of the input [B, C, *sizes], of the filters [p, C, *kernel] and of the bias [p]; grad [B, p, *out]."""
    by_input = None
    if output_mask[0]:
        rest: Any = (stride, padding, dilation, transposed, output_padding, groups, [True, False, False])
        by_input = aten.convolution_backward(grad, x, weight, None, *rest)[0]
    kernel, dims = weight.shape[2:], range(2, weight.dim())
    for dim, size, k, s in zip(dims, grad.shape[2:], kernel, per_dimension(stride, len(kernel)), strict=True):
        x = x.narrow(dim, 0, size * k) if k == s else x.narrow(dim, 0, s * (size - 1) + 1)[_every(dim, s)]
    cut = [n for size, k in zip(grad.shape[2:], kernel, strict=True) for n in (size, k)]
    places, inside = [2 * d - 2 for d in dims], [2 * d - 1 for d in dims]  # among [B, C, *cut]
    patches = x.reshape(*x.shape[:2], *cut).permute(0, *places, 1, *inside).reshape(-1, weight[0].numel())
    outputs = grad.permute(0, *dims, 1).reshape(-1, weight.shape[0])
    by_weight = (outputs.t() @ patches).reshape(weight.shape)
    return by_input, by_weight, grad.sum([0, *dims]) if output_mask[2] else None


def _every(dim: int, step: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(None, None, step))
