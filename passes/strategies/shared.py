"""Linear layers of one clipping group that read the same input (q, k, v; gate and up) as one layer.

The squares of their norms add up, and one kernel measures them together, as `Strategy.together` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.points import ParameterGradient, contracted_axes
from flashdp_compile.passes.strategies.base import Prepared, Together
from flashdp_compile.passes.strategies.linear import weighted_product
from flashdp_compile.passes.strategies.operands import linear_operands, linear_terms
from flashdp_compile.passes.values import Values


@dataclass(frozen=True)
class SharedInput:
    """Parameters whose products have one operand in common, and on which side of each product it stands: 0 or 1."""

    names: tuple[str, ...]
    sides: tuple[int, ...]


def same_input(gradients: Sequence[ParameterGradient], axes: Axes, values: Values) -> tuple[SharedInput, ...]:
    """The gradients in runs of two and more that share an input; each gradient is in one run at most."""
    readers: dict[Any, dict[str, int]] = {}
    for gradient in gradients:
        if len(linear_terms(gradient)) == len(gradient.terms or ()) == 1:
            for side in (0, 1):
                readers.setdefault(_identity(gradient, axes, values, side), {}).setdefault(gradient.name, side)
    taken: set[str] = set()
    runs = []
    for run in sorted(readers.values(), key=len, reverse=True):
        free = {name: side for name, side in run.items() if name not in taken}
        if len(free) > 1:
            runs.append(SharedInput(tuple(free), tuple(free.values())))
            taken.update(free)
    return tuple(runs)


def prepare_shared(
    emit: Emitter, axes: Axes, together: Together, run: Sequence[ParameterGradient], sides: tuple[int, ...]
) -> list[Prepared]:
    """The gradients of a run; the first one's squared norms are those of all together."""
    all_operands = [linear_operands(g, axes) for g in run]
    norm, more = together(emit, axes, run)

    def sqnorm(batch: Any, *given: Tensor) -> Tensor:
        own, values = given[: len(more)], given[len(more) :]
        pairs = [o.view(batch, *values[2 * i : 2 * i + 2]) for i, o in enumerate(all_operands)]
        others = [pair[1 - side] for pair, side in zip(pairs, sides, strict=True)]
        return norm(pairs[0][sides[0]], others, *own)

    measured = emit.per_sample(sqnorm, *more, *[leaf for o in all_operands for leaf in o.leaves])
    return [
        Prepared(measured if i == 0 else None, weighted_product(emit, axes, gradient)) for i, gradient in enumerate(run)
    ]


def _identity(gradient: ParameterGradient, axes: Axes, values: Values, side: int) -> Any:
    """Equal for operands that are the same [B, T, d] tensor, whichever views lead to them."""
    product: fx.Node = linear_terms(gradient)[0].point.node
    axis = contracted_axes(product, axes)[side]
    root, dims = values.layout(product.args[side])
    if side == 0:  # stands transposed in the product
        dims = (*dims[:-2], dims[-1], dims[-2])
    return values[root], str(dims), str(axis.outer), str(axis.inner)
