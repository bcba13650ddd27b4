"""Reads a clipped sum off the graph, as written by whatever strategy: which weights, and of what.

A sample's share v_b of a gradient has a form that a clipped sum and a norm both name: the tensor itself, or the factors
of a product, or the ids and rows of an embedding. If sum_b w_b v_b leaves the graph, and w_b was made from the squared
norms of the very same v (`norms.py`), then no sample adds more than its bound, whatever v is. So forms are compared by
value (`values.py`), and nothing needs to be known about layers or strategies. An expression that is not understood is
not accepted; an op that a new strategy sums with gets a line in `_SUMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from flashdp_compile.kernels import catalogue  # noqa: F401  registers the ops that the table names
from flashdp_compile.passes.nodes import is_zero
from flashdp_compile.passes.values import Values, plain

aten, prims, flashdp = torch.ops.aten, torch.ops.prims, torch.ops.flashdp

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Part:
    """`tensor` (v), `product` (x, g: v_b = x_b^T g_b) or `rows` (ids, g: row ids_bt of v_b gets g_bt), by value."""

    form: str
    operands: tuple[int, ...]

    def transposed(self) -> Part:
        return Part(self.form, self.operands[::-1]) if self.form == "product" else self


Share = tuple[Part, ...]
"""What one sample adds to one gradient: the sum of its parts."""


class Drawn(NamedTuple):
    """Probes that a norm is estimated from: the node that says so, their key, the streams and how many there are."""

    by: fx.Node
    key: fx.Node
    streams: tuple[Any, ...]
    probes: Any


class NotProved(Exception):
    """An expression that cannot be read as what it must be; the text says what it is instead."""


def share_of(*parts: Part) -> Share:
    """A product alone is as long as its transpose; where it is added to others its layout matters."""
    if len(parts) == 1:
        return (min(parts[0], parts[0].transposed(), key=lambda p: p.operands),)
    return tuple(sorted(parts, key=lambda p: (p.form, p.operands)))


class Reader:
    """Reads one graph. `tainted`: nodes that depend on clip weights or noise, which no share may.

    `single`: the graph is for a batch of one sample, whose share is the whole gradient, without a batch dimension.
    `slack` grows to the largest slack of the strategies whose norms were read, and `drawn` by the probes of those that
    are estimated.
    """

    def __init__(self, values: Values, tainted: set[fx.Node], single: bool) -> None:
        self.values, self.single, self.slack = values, single, 0.0
        self.drawn: list[Drawn] = []
        self._tainted = tainted

    def clipped_sum(self, node: fx.Node) -> tuple[fx.Node, Share]:
        """(weights, share): the clip_factors node w and the v of sum_b w_b v_b, a sample of weight 0 left out."""
        root, _ = self.values.layout(node)
        addends = root.args if root.target is aten.add.Tensor and not root.kwargs else (root,)
        if any(plain(addend) != plain(root) for addend in addends):
            raise NotProved(f"{root} adds values of other shapes, so that some are added more than once")
        parts, weights = [], set()
        for addend in addends:
            found, _ = self.values.layout(addend)
            read = _SUMS.get(found.target)
            if read is None:
                raise NotProved(f"{found} ({found.target}) is no sum that takes weights")
            by, part = read(self, found)
            weights.add(by)
            # whatever is read of it is read once, so a share of one part is as long in any layout
            parts.append(part if len(addends) == 1 else self._oriented(addend, part))
        if len(weights) != 1:
            raise NotProved(f"its parts are weighted by {', '.join(sorted(w.name for w in weights))}")
        return weights.pop(), share_of(*parts)

    def part(self, form: str, *operands: fx.Node) -> Part:
        for operand in operands:
            if operand in self._tainted:
                raise NotProved(f"{operand}, of which a sum is made, depends on clip weights or noise")
        return Part(form, tuple(self.values[n] for n in operands))

    def estimated(self, by: fx.Node, key: fx.Node, streams: Sequence[Any], probes: Any) -> None:
        self.drawn.append(Drawn(by, key, tuple(streams), probes))

    def rounded(self, slack: float) -> None:
        self.slack = max(self.slack, slack)

    def weights(self, node: Any) -> fx.Node | None:
        """The clip_factors node whose weights a value holds, in order along its first dimension; else None."""
        if not isinstance(node, fx.Node):
            return None
        root, dims = self.values.layout(node)
        if dims[:1] != plain(root)[:1] or any(dims[1:]):
            return None
        if root.target is prims.convert_element_type.default and root.args[1] in WIDE:
            return self.weights(root.args[0])
        return root if root.target is flashdp.clip_factors.default else None

    def expect_weights(self, node: Any) -> fx.Node:
        weights = self.weights(node)
        if weights is None:
            raise NotProved(f"{node} stands where clip weights belong")
        return weights

    def _oriented(self, addend: fx.Node, part: Part) -> Part:
        """A part as its addend holds it, which may be a permutation of what the kernel returned."""
        root, dims = self.values.layout(addend)
        upright = plain(root)
        if dims == upright:
            return part
        if part.form == "product" and dims == upright[::-1]:
            return part.transposed()
        return Part(f"relabelled {part.form}", part.operands)


def arguments(node: fx.Node, count: int) -> tuple[Any, ...]:
    if len(node.args) != count or node.kwargs:
        raise NotProved(f"{node} ({node.target}) has arguments that are not known here")
    return node.args


def _weighted_matmul(reader: Reader, node: fx.Node) -> tuple[fx.Node, Part]:
    x, g, weights = arguments(node, 3)
    return reader.expect_weights(weights), reader.part("product", x, g)


def _embedding_sum(reader: Reader, node: fx.Node) -> tuple[fx.Node, Part]:
    ids, g, weights, _ = arguments(node, 4)
    return reader.expect_weights(weights), reader.part("rows", ids, g)


def _product_sum(reader: Reader, node: fx.Node) -> tuple[fx.Node, Part]:
    stored, weights = arguments(node, 2)
    return reader.expect_weights(weights), reader.part("tensor", stored)


def _sum(reader: Reader, node: fx.Node) -> tuple[fx.Node, Part]:
    kept, dims = arguments(node, 2)
    if list(dims) != [0] or reader.single:
        raise NotProved(f"{node} sums over dimensions {list(dims)} and not over the samples")
    return _kept(reader, kept)


def _only_sample(reader: Reader, node: fx.Node) -> tuple[fx.Node, Part]:
    if not reader.single:
        raise NotProved(f"{node} does not sum over the samples")
    return _kept(reader, node)


def _kept(reader: Reader, node: fx.Node) -> tuple[fx.Node, Part]:
    """where(w != 0, v * w, 0): the product alone would let 0 times infinity through."""
    if node.target is not aten.where.self:
        raise NotProved(f"{node} ({node.target}) does not leave out samples of weight 0")
    nonzero, weighted, otherwise = arguments(node, 3)
    if weighted.target is not aten.mul.Tensor:
        raise NotProved(f"{weighted} ({weighted.target}) is no product with clip weights")
    factors = arguments(weighted, 2)
    by = [reader.weights(f) for f in factors]
    if (by[0] is None) == (by[1] is None):
        raise NotProved(f"{weighted} is no product of values and clip weights")
    values, weights = factors if by[0] is None else factors[::-1]
    if not reader.single and len(plain(values)) != len(plain(weights)):
        raise NotProved(f"{weighted} lays the weights along another dimension than the samples")
    asked = nonzero.args if nonzero.target is aten.ne.Scalar else (None, None)
    if asked[0] is None or reader.values[asked[0]] != reader.values[weights] or asked[1] != 0:
        raise NotProved(f"{node} keeps samples for another reason than that their weight is not 0")
    if not is_zero(otherwise):
        raise NotProved(f"{node} puts {otherwise} in the place of samples of weight 0")
    if values.meta["val"].dtype not in WIDE:
        raise NotProved(f"{values} would be rounded to {values.meta['val'].dtype} after its norm was taken")
    return reader.expect_weights(weights), reader.part("tensor", values)


_SUMS: dict[Any, Callable[[Reader, fx.Node], tuple[fx.Node, Part]]] = {
    flashdp.weighted_matmul.default: _weighted_matmul,
    flashdp.embedding_sum.default: _embedding_sum,
    flashdp.product_sum.default: _product_sum,
    aten.sum.dim_IntList: _sum,
    aten.where.self: _only_sample,
}
