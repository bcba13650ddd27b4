"""What a strategy costs, as expressions in the graph's own sizes, and how long that takes on a device.

Sizes are sympy expressions (B, T, d, p or their values), so one formula serves the report and the choice. Costs count
the norm and the weighted sum that follows it, since some strategies make the second one cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from flashdp_compile.compat import size_expression
from flashdp_compile.passes.axes.domain import Batched, product
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.points import ParameterGradient


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes moved, and bytes held from the norm to the weighted sum."""

    flops: sympy.Expr
    moved: sympy.Expr
    held: sympy.Expr

    def __post_init__(self) -> None:
        for name in ("flops", "moved", "held"):
            object.__setattr__(self, name, sympy.sympify(getattr(self, name)))


@dataclass(frozen=True)
class Device:
    """Rates of a device: matrix operations per second, bytes per second, seconds to start a kernel."""

    name: str
    flops: float
    bandwidth: float
    launch: float

    def seconds(self, flops: float, moved: float) -> float:
        return flops / self.flops + moved / self.bandwidth + self.launch


# One H100 SXM: 600 TFLOP/s is what tuned bf16 kernels reach, 3.0 TB/s a copy. A CPU core's figures only rank choices.
H100 = Device("H100", 600e12, 3.0e12, 4e-6)
CPU = Device("CPU", 1e11, 2e10, 1e-5)


def device_of(gradient: ParameterGradient) -> Device:
    """The rates for the device that a gradient lives on."""
    return H100 if gradient.gradient.node.meta["val"].device.type == "cuda" else CPU


@dataclass(frozen=True)
class LinearSizes:
    """B, T, d, p of a gradient made of matrix products; T counts all its terms, `item` is bytes per element."""

    B: sympy.Expr
    T: sympy.Expr
    d: sympy.Expr
    p: sympy.Expr
    item: int


def contracted_axes(product: fx.Node, axes: Axes) -> tuple[Batched, Batched]:
    """The batch axes of both operands of a matrix product that sums over samples.

    One side may be the same for all samples (a first hidden state, say): it is read along the other side's axis.
    """
    inner = (1, 0) if product.target._opname == "mm" else (2, 1)
    states = [axes[n] for n in product.args[:2]]
    known = next(s for s, dim in zip(states, inner, strict=True) if isinstance(s, Batched) and s.dim == dim)
    left, right = (Batched(dim, known.outer, known.inner) for dim in inner)
    return left, right


def linear_sizes(gradient: ParameterGradient, axes: Axes) -> LinearSizes:
    """The sizes of the matrix products among the terms of a gradient."""
    tokens = sympy.Integer(0)
    for term in gradient.terms or ():
        if term.point.kind == "linear":
            axis = contracted_axes(term.point.node, axes)[1]
            tokens += axis.outer * axis.inner
            d, p = (size_expression(s) for s in term.point.node.meta["val"].shape)
            item = term.point.node.args[0].meta["val"].element_size()
    return LinearSizes(sympy.sympify(axes.joint.batch), tokens, sympy.sympify(d), sympy.sympify(p), item)


def _factors(s: LinearSizes) -> sympy.Expr:
    return s.B * s.T * (s.d + s.p) * s.item


def gram_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """Half of two T x T Gram matrices per sample, then the weighted product."""
    s = linear_sizes(gradient, axes)
    return Cost(s.B * s.T**2 * (s.d + s.p) + 2 * s.B * s.T * s.d * s.p, 2 * _factors(s) + 4 * s.d * s.p, _factors(s))


def outer_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """The product twice: once for its norm, once weighted."""
    s = linear_sizes(gradient, axes)
    return Cost(4 * s.B * s.T * s.d * s.p, 2 * _factors(s) + 4 * s.d * s.p, _factors(s))


def store_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """The product once, written and read back."""
    s = linear_sizes(gradient, axes)
    stored = s.B * s.d * s.p * s.item
    return Cost(2 * s.B * s.T * s.d * s.p, _factors(s) + 2 * stored + 4 * s.d * s.p, stored)


def _embedding_sizes(gradient: ParameterGradient, axes: Axes) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr, int]:
    """(B, T, d, bytes per element) of the lookups among the terms."""
    tokens, item = sympy.Integer(0), 4
    for term in gradient.terms or ():
        if term.point.kind == "embedding":
            values = next(
                n for n in reversed(term.point.node.all_input_nodes) if n.meta["val"].is_floating_point()
            ).meta["val"]
            item = values.element_size()
            tokens += product([size_expression(s) for s in values.shape[:-1]]) / sympy.sympify(axes.joint.batch)
    return sympy.sympify(axes.joint.batch), tokens, sympy.sympify(size_expression(gradient.shape[-1])), item


def embedding_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """Half of one T x T Gram matrix per sample, then a scatter."""
    B, T, d, item = _embedding_sizes(gradient, axes)
    return Cost(B * T**2 * d, 3 * B * T * d * item, B * T * d * item)


def tied_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """Both parts, and T x T dot products of the embedding's gradient with the head's input for the cross term."""
    lookup, head = embedding_cost(gradient, axes), gram_cost(gradient, axes)
    B, T, d, item = _embedding_sizes(gradient, axes)
    S = linear_sizes(gradient, axes).T
    return Cost(
        lookup.flops + head.flops + 2 * B * T * S * d,
        lookup.moved + head.moved + B * T * S * item,
        lookup.held + head.held,
    )


@dataclass(frozen=True)
class MaterializeWork:
    """Operations and bytes of all points, and the number of elements of [B, *shape]."""

    flops: sympy.Expr
    bytes: sympy.Expr
    result: sympy.Expr


def materialize_work(gradient: ParameterGradient, axes: Axes) -> MaterializeWork:
    """The points' own work, once, as if every sample had its own result."""
    flops, moved = sympy.Integer(0), sympy.Integer(0)
    for point in gradient.points:
        sizes = [
            sympy.sympify(product([size_expression(s) for s in n.meta["val"].shape]))
            for n in point.node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor) and isinstance(axes.states.get(n), Batched)
        ]
        moved += 4 * sum(sizes)
        shape = [size_expression(s) for s in gradient.shape]
        if "linear" in point.kind:
            contracted = size_expression(point.node.args[0].meta["val"].shape[-1])
            flops += 2 * contracted * product(shape)
        elif point.kind == "convolution":
            output = point.node.args[0].meta["val"].shape
            flops += 2 * product([size_expression(s) for s in (output[0], *output[2:])]) * product(shape)
        else:
            flops += sum(sizes)
    result = sympy.sympify(product([size_expression(s) for s in gradient.shape]) * axes.joint.batch)
    return MaterializeWork(flops, moved, result)
