"""What a strategy costs, as expressions in the graph's own sizes, and how long that takes on a device.

Sizes are sympy expressions (B, T, d, p or their values), so one formula serves the report and the choice. Costs count
the norm and the weighted sum that follows it, since some strategies make the second one cheaper. The time is that of
the kernels that run, one by one: each family reaches its own share of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch

from flashdp_compile.compat import size_expression
from flashdp_compile.passes.axes.domain import Batched, product
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.points import ParameterGradient, contracted_axes


class Kernel(NamedTuple):
    """Work of one kernel: its family's name, operations, and the bytes that it does not move while it computes."""

    family: str
    flops: sympy.Expr
    moved: sympy.Expr


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes moved, and bytes held from the norm to the weighted sum; and what runs."""

    flops: sympy.Expr
    moved: sympy.Expr
    held: sympy.Expr
    kernels: tuple[Kernel, ...]

    def __post_init__(self) -> None:
        for name in ("flops", "moved", "held"):
            object.__setattr__(self, name, sympy.sympify(getattr(self, name)))


@dataclass(frozen=True)
class Device:
    """Rates of a device.

    `rates` has operations per second by family, `other` those of the rest; `bandwidth` is bytes per second, `launch`
    the seconds to start a kernel, `fill` what one that computes takes more to fill and to drain the device. A Gram
    matrix is computed in tiles of `tile` tokens, on and below the diagonal.
    """

    name: str
    rates: Mapping[str, float]
    other: float
    bandwidth: float
    launch: float
    fill: float = 0.0
    tile: int = 0

    def seconds(self, kernels: Iterable[Kernel]) -> sympy.Expr:
        """How long the kernels take, one after the other."""
        return sympy.Add(*map(self._seconds, kernels))

    def _seconds(self, kernel: Kernel) -> sympy.Expr:
        start = self.launch + (self.fill if kernel.family in self.rates else 0.0)
        return kernel.flops / self.rates.get(kernel.family, self.other) + kernel.moved / self.bandwidth + start


# One H200, fitted to docs/performance/h200-planner.json: matrix kernels hide what they read, not what they write.
# Products that are materialised are of float32. A CPU core's figures only rank choices.
H200 = Device(
    "H200",
    {
        "outer_sqnorm": 900e12,
        "outer_store": 760e12,
        "gram_sqnorm": 740e12,
        "weighted_matmul": 540e12,
        "sketch_sqnorm": 900e12,
    },
    other=50e12,
    bandwidth=3.8e12,
    launch=3e-6,
    fill=9e-6,
    tile=128,
)
CPU = Device("CPU", {}, other=1e11, bandwidth=2e10, launch=1e-5)


def device_of(gradient: ParameterGradient) -> Device:
    """The rates for the device that a gradient lives on."""
    return H200 if gradient.gradient.node.meta["val"].device.type == "cuda" else CPU


@dataclass(frozen=True)
class LinearSizes:
    """B, T, d, p of a gradient made of matrix products; T counts all its terms, `item` is bytes per element."""

    B: sympy.Expr
    T: sympy.Expr
    d: sympy.Expr
    p: sympy.Expr
    item: int


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


@dataclass(frozen=True)
class Factors:
    """Sizes, dtype and device of the factors x [B, T, d] and g [B, T, p] of a gradient, in numbers."""

    B: int
    T: int
    d: int
    p: int
    dtype: torch.dtype
    device: torch.device


def linear_factors(gradient: ParameterGradient, axes: Axes, number: Callable[[sympy.Expr], int]) -> Factors:
    """The factors of a gradient made of matrix products; `number` tells the value of a size."""
    s = linear_sizes(gradient, axes)
    operand = next(t.point.node.args[0].meta["val"] for t in gradient.terms or () if t.point.kind == "linear")
    return Factors(number(s.B), number(s.T), number(s.d), number(s.p), operand.dtype, operand.device)


def _factors(s: LinearSizes) -> sympy.Expr:
    return s.B * s.T * (s.d + s.p) * s.item


def linear_kernels(s: LinearSizes, device: Device) -> dict[str, tuple[Kernel, Kernel]]:
    """What each strategy runs for a matrix product: the norm, then the weighted sum."""
    product, none = 2 * s.B * s.T * s.d * s.p, sympy.Integer(0)
    stored, result = s.B * s.d * s.p * s.item, 4 * s.d * s.p
    weighted = Kernel("weighted_matmul", product, result)
    return {
        "gram": (Kernel("gram_sqnorm", s.B * s.T * (s.T + device.tile) * (s.d + s.p), none), weighted),
        "outer": (Kernel("outer_sqnorm", product, none), weighted),
        "store": (Kernel("outer_store", product, stored), Kernel("product_sum", none, stored + result)),
    }


def gram_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """Half of two T x T Gram matrices per sample, then the weighted product."""
    s = linear_sizes(gradient, axes)
    flops = s.B * s.T**2 * (s.d + s.p) + 2 * s.B * s.T * s.d * s.p
    kernels = linear_kernels(s, device_of(gradient))["gram"]
    return Cost(flops, 2 * _factors(s) + 4 * s.d * s.p, _factors(s), kernels)


def outer_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """The product twice: once for its norm, once weighted."""
    s = linear_sizes(gradient, axes)
    kernels = linear_kernels(s, device_of(gradient))["outer"]
    return Cost(4 * s.B * s.T * s.d * s.p, 2 * _factors(s) + 4 * s.d * s.p, _factors(s), kernels)


def sketch_kernel(s: LinearSizes, probes: int) -> Kernel:
    """Both factors once through products with so many columns, in two halves each."""
    return Kernel("sketch_sqnorm", 4 * s.B * s.T * probes * (s.d + s.p), _factors(s) + 16 * s.B * s.T * probes)


def sketch_cost(gradient: ParameterGradient, axes: Axes, probes: int) -> Cost:
    """The estimate, then the weighted product."""
    s = linear_sizes(gradient, axes)
    device = device_of(gradient)
    norm = sketch_kernel(s, probes)
    weighted = linear_kernels(s, device)["outer"][1]
    return Cost(norm.flops + weighted.flops, norm.moved + _factors(s) + weighted.moved, _factors(s), (norm, weighted))


def store_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """The product once, written and read back."""
    s = linear_sizes(gradient, axes)
    stored = s.B * s.d * s.p * s.item
    kernels = linear_kernels(s, device_of(gradient))["store"]
    return Cost(2 * s.B * s.T * s.d * s.p, _factors(s) + 2 * stored + 4 * s.d * s.p, stored, kernels)


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
    """Rows of equal ids added up and squared, and once more with weights, into a table that is written as a whole."""
    B, T, d, item = _embedding_sizes(gradient, axes)
    rows, table = B * T * d, 4 * d * sympy.sympify(size_expression(gradient.shape[0]))
    norm = Kernel("embedding_sqnorm", 3 * rows, rows * item)
    total = Kernel("embedding_sum", 2 * rows, rows * item + table)
    return Cost(norm.flops + total.flops, norm.moved + total.moved, rows * item, (norm, total))


def tied_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """Both parts, and T x T dot products of the embedding's gradient with the head's input for the cross term."""
    B, T, d, item = _embedding_sizes(gradient, axes)
    S = linear_sizes(gradient, axes).T
    cross = Kernel("tied_cross", 2 * B * T * S * d, B * T * S * item)
    return _with_lookups(gradient, axes, gram_cost(gradient, axes), cross)


def tied_store_cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """Both parts, and a row of the stored product for every token."""
    B, T, d, item = _embedding_sizes(gradient, axes)
    cross = Kernel("stored_cross", 2 * B * T * d, 2 * B * T * d * item)
    return _with_lookups(gradient, axes, store_cost(gradient, axes), cross)


def _with_lookups(gradient: ParameterGradient, axes: Axes, head: Cost, cross: Kernel) -> Cost:
    """What a tied table costs, from its head and the cross term."""
    lookup = embedding_cost(gradient, axes)
    return Cost(
        lookup.flops + head.flops + cross.flops,
        lookup.moved + head.moved + cross.moved,
        lookup.held + head.held,
        (*lookup.kernels, *head.kernels, cross),
    )


def tied_sketch_cost(gradient: ParameterGradient, axes: Axes, probes: int) -> Cost:
    """Both parts' rows once through products with so many columns, and the sums of both with weights."""
    (_, total), head = embedding_cost(gradient, axes).kernels, sketch_cost(gradient, axes, probes)
    B, T, d, item = _embedding_sizes(gradient, axes)
    rows = Kernel("sketch_sqnorm", 4 * B * T * probes * d, B * T * d * item)
    kernels = (*head.kernels, rows, total)
    flops, moved = (sum(getattr(k, name) for k in kernels) for name in ("flops", "moved"))
    return Cost(flops, moved, B * T * d * item + head.held, kernels)


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
        if point.kind in ("linear", "batched linear", "bilinear"):
            samples = 0 if point.kind == "bilinear" else -1  # the dimension that is summed over
            contracted = size_expression(point.node.args[0].meta["val"].shape[samples])
            flops += 2 * contracted * product(shape)
        elif point.kind == "convolution":
            output = point.node.args[0].meta["val"].shape
            flops += 2 * product([size_expression(s) for s in (output[0], *output[2:])]) * product(shape)
        else:
            flops += sum(sizes)
    result = sympy.sympify(product([size_expression(s) for s in gradient.shape]) * axes.joint.batch)
    return MaterializeWork(flops, moved, result)
