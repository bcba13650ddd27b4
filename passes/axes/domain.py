"""What is known about one value of the graph: where its samples live, or that they have been summed away.

Constant          carries no sample data
Batched           dimension `dim` holds the samples
Reduced           a linear function of sums over the samples; the sums are its points
Mixed             any other function of several samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import sympy
from torch import fx

from flashdp_compile.compat import size_expression

Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class Constant:
    """No sample data. `zero`: every element is known to be zero, so that adding it changes nothing."""

    zero: bool = False

    def __str__(self) -> str:
        return "zero" if self.zero else "constant"


@dataclass(frozen=True)
class Batched:
    """Dimension `dim` has size outer*B*inner and sample b owns the indices (o, b, i) of it.

    `weight` names the clip weights that every element has been multiplied by; None before the rewrite.
    """

    dim: int
    outer: Size = 1
    inner: Size = 1
    weight: str | None = None

    def at(self, dim: int) -> Batched:
        return replace(self, dim=dim)

    def aligned(self, other: Batched) -> bool:
        """Whether both hold the samples in the same order in the same dimension."""
        return (self.dim, self.outer, self.inner) == (other.dim, other.outer, other.inner)

    def __str__(self) -> str:
        factors = [str(f) for f in (self.outer, "B", self.inner) if f != 1]
        return f"dim {self.dim} = {'*'.join(factors)}" + (f" weighted by {self.weight}" if self.weight else "")


@dataclass(frozen=True)
class PointKey:
    """The place where samples are summed: a node, and which of its results if it has several."""

    node: fx.Node
    output: int | None = None

    def __str__(self) -> str:
        return str(self.node) if self.output is None else f"{self.node}[{self.output}]"


@dataclass(frozen=True)
class Reduced:
    """A linear, batch-free function of the sums at `points`. `weight`: as for Batched, common to all points."""

    points: tuple[PointKey, ...]
    weight: str | None = None

    def __str__(self) -> str:
        return f"sum over samples at {', '.join(map(str, self.points))}" + (
            f" weighted by {self.weight}" if self.weight else ""
        )


@dataclass(frozen=True)
class Mixed:
    """Depends on several samples in a way that is not a sum. `why` says how it arose, for the refusal."""

    why: str

    def __str__(self) -> str:
        return f"mixed: {self.why}"


State = Constant | Batched | Reduced | Mixed
CONSTANT = Constant()
ZERO = Constant(zero=True)


class Reject(Exception):
    """Raised by a rule: the reason and a remedy. The engine adds the op, the user's line and the parameters."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix


@dataclass(frozen=True)
class Site:
    """Where a rule is applied: the node, with its sizes as ints or sympy expressions, and the batch size B.

    `draws` collects the random numbers of which each sample turned out to have its own; see axes/uniform.py. `met`
    collects the constants with an element for each sample, by who reads them so: (reader, constant).
    """

    node: fx.Node
    batch: Size
    draws: dict[fx.Node, Batched] = field(default_factory=dict)
    met: dict[tuple[fx.Node, fx.Node], Batched] = field(default_factory=dict)

    def shape(self, node: Any = None) -> list[Size]:
        """Sizes of `node`, of this site's own (first) result when left out."""
        value = (node if isinstance(node, fx.Node) else self.node).meta["val"]
        if isinstance(value, (tuple, list)):
            value = next(v for v in value if v is not None)
        return [size_expression(s) for s in value.shape]

    def arg_shape(self, index: int = 0) -> list[Size]:
        return self.shape(self.node.args[index])

    def arg_rank(self, index: int = 0) -> int:
        return len(self.arg_shape(index))

    def point(self, output: int | None = None, weight: str | None = None) -> Reduced:
        return Reduced((PointKey(self.node, output),), weight)


def merge(states: Sequence[Reduced]) -> Reduced:
    """The state of a linear combination of batch sums; it keeps a weight only if all share it."""
    points = tuple(dict.fromkeys(p for s in states for p in s.points))
    weights = {s.weight for s in states}
    return Reduced(points, weights.pop() if len(weights) == 1 else None)


def product(sizes: Sequence[Size]) -> Size:
    result: Size = 1
    for s in sizes:
        result = result * s
    return result


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return sympy.expand(sympy.sympify(a) - b) == 0


def quotient(a: Size, b: Size) -> Size | None:
    """a / b if it is a whole polynomial for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(a) / b))
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator
