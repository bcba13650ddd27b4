"""Linear layers of one clipping group that read the same input (q, k, v; gate and up) as one layer.

Their squared norms add up to <A, sum_l G_l>, where A is the Gram matrix of the shared x and G_l those of the output
gradients: one kernel computes A once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import contracted_axes
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Prepared
from flashdp_compile.passes.strategies.linear import weighted_product
from flashdp_compile.passes.strategies.operands import linear_operands, linear_terms

aten = torch.ops.aten
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
)


def same_input(gradients: Sequence[ParameterGradient], axes: Axes) -> list[list[ParameterGradient]]:
    """The gradients in runs of two and more that share an input; each gradient is in one run at most."""
    readers: dict[Any, list[ParameterGradient]] = {}
    for gradient in gradients:
        if len(linear_terms(gradient)) == len(gradient.terms or ()) == 1:
            for side in (0, 1):
                readers.setdefault(_identity(gradient, axes, side), []).append(gradient)
    taken: set[str] = set()
    runs = []
    for run in sorted(readers.values(), key=len, reverse=True):
        free = [g for g in dict.fromkeys(run) if g.name not in taken]
        if len(free) > 1:
            runs.append(free)
            taken.update(g.name for g in free)
    return runs


def prepare_shared(emit: Emitter, axes: Axes, run: Sequence[ParameterGradient]) -> list[Prepared]:
    """The gradients of a run; the first one's squared norms are those of all together."""
    all_operands = [linear_operands(g, axes) for g in run]
    keys = [{_identity(g, axes, side): side for side in (0, 1)} for g in run]
    common = next(k for k in keys[0] if all(k in other for other in keys))
    sides = [k[common] for k in keys]

    def sqnorm(batch: Any, *values: Tensor) -> Tensor:
        pairs = [o.view(batch, *values[2 * i : 2 * i + 2]) for i, o in enumerate(all_operands)]
        others = [pair[1 - side] for pair, side in zip(pairs, sides, strict=True)]
        return torch.ops.flashdp.gram_sqnorm(pairs[0][sides[0]], others, [False] * len(others))

    together = emit.per_sample(sqnorm, *[leaf for o in all_operands for leaf in o.leaves])
    return [
        Prepared(together if i == 0 else None, weighted_product(emit, axes, gradient)) for i, gradient in enumerate(run)
    ]


def _identity(gradient: ParameterGradient, axes: Axes, side: int) -> Any:
    """Equal for operands that are the same [B, T, d] tensor, whichever views lead to them."""
    product = linear_terms(gradient)[0].point.node
    axis = contracted_axes(product, axes)[side]
    key = _viewed(product.args[side])
    if side == 0:  # stands transposed in the product
        permuted = isinstance(key, tuple) and key[:2] == (aten.permute.default, "[1, 0]")
        key = key[2] if permuted else ("transposed", key)
    return key, str(axis.outer), str(axis.inner)


def _viewed(node: fx.Node) -> Any:
    """A node without the views upon it: equal keys, equal values."""
    if node.target not in _VIEWS:
        return node
    arguments = str([node.meta["val"].shape]) if "view" in str(node.target) else str(node.args[1])
    return node.target, arguments, _viewed(node.args[0])
