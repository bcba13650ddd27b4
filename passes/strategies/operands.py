"""The operands of linear and embedding points as per-sample tensors x [B, T, d], g [B, T, p] and ids [B, T]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flashdp_compile.passes.axes.domain import Batched
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.points import ParameterGradient, Term, contracted_axes
from flashdp_compile.passes.strategies.base import split

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """Graph values that a gradient is made of, and the function that turns them into per-sample tensors.

    `view(B, *values)` gives (x, g) for linear terms or (ids, g) for embeddings, several terms joined along T.
    `relabelling` leads from x^T g to the gradient.
    """

    leaves: tuple[fx.Node, ...]
    view: Callable[..., tuple[Tensor, Tensor]]
    relabelling: tuple[Any, ...]


def linear_terms(gradient: ParameterGradient) -> tuple[Term, ...]:
    """The terms that are matrix products."""
    return tuple(t for t in gradient.terms or () if t.point.kind == "linear")


def embedding_terms(gradient: ParameterGradient) -> tuple[Term, ...]:
    """The terms that add rows into a table of two dimensions."""
    return tuple(t for t in gradient.terms or () if t.point.kind == "embedding")


def same_relabelling(terms: tuple[Term, ...]) -> bool:
    """Whether all terms enter the gradient in the same layout, so that they can be joined along T."""
    return all(t.relabelling == terms[0].relabelling for t in terms)


def linear_operands(gradient: ParameterGradient, axes: Axes) -> Operands:
    """x and g of a (sum of) matrix products: the point is x^T g, its left operand is x transposed."""
    terms = linear_terms(gradient)
    leaves = [n for t in terms for n in t.point.node.args[:2]]
    states = [a for t in terms for a in contracted_axes(t.point.node, axes)]

    def view(batch: Any, *values: Tensor) -> tuple[Tensor, Tensor]:
        lefts = [split(v, s, batch).transpose(1, 2) for v, s in zip(values[::2], states[::2], strict=True)]
        rights = [split(v, s, batch) for v, s in zip(values[1::2], states[1::2], strict=True)]
        return _joined(lefts), _joined(rights)

    return Operands(tuple(leaves), view, terms[0].relabelling)


def embedding_operands(gradient: ParameterGradient, axes: Axes) -> Operands:
    """ids and g of (a sum of) embedding backwards; ids that are masked out (padding) become -1."""
    leaves: list[fx.Node] = []
    readers: list[tuple[int, Callable[..., tuple[Tensor, Tensor]]]] = []
    for term in embedding_terms(gradient):
        nodes, reader = _reader(term.point.node, axes)
        readers.append((len(leaves), reader))
        leaves.extend(nodes)

    def view(batch: Any, *values: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [reader(batch, *values[first:]) for first, reader in readers]
        return _joined([p[0] for p in pairs]), _joined([p[1] for p in pairs])

    return Operands(tuple(leaves), view, ())


def is_embedding(node: fx.Node, axes: Axes) -> bool:
    """Whether a point adds whole rows into a two-dimensional table, at indices that carry the same samples."""
    found = _parts(node)
    if found is None:
        return False
    ids, _, values = found
    state, own = axes[values], axes.seen_by(node, ids)
    return (
        isinstance(state, Batched)
        and isinstance(own, Batched)
        and state.aligned(own)
        and len(values.meta["val"].shape) == len(ids.meta["val"].shape) + 1
        and (not _is_masked(node) or len(node.args[1].meta["val"].shape) == len(values.meta["val"].shape))
    )


def _is_masked(node: fx.Node) -> bool:
    return "masked" in node.target._opname


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node] | None:
    """(ids, mask, values) of a point, if its table has two dimensions and the first alone is indexed."""
    if len(node.meta["val"].shape) != 2:
        return None
    if node.target is aten.embedding_dense_backward.default:
        return node.args[1], None, node.args[0]
    indices, values = (node.args[2], node.args[3]) if _is_masked(node) else (node.args[1], node.args[2])
    if len(indices) != 1 or indices[0] is None:
        return None
    return indices[0], node.args[1] if _is_masked(node) else None, values


def _reader(node: fx.Node, axes: Axes) -> tuple[list[fx.Node], Callable[..., tuple[Tensor, Tensor]]]:
    parts = _parts(node)
    assert parts is not None
    ids_node, mask_node, values_node = parts
    ids_axis, values_axis = axes.seen_by(node, ids_node), axes[values_node]
    padding = node.args[3] if node.target is aten.embedding_dense_backward.default else None
    rows = node.meta["val"].shape[0]

    def read(
        batch: Any, ids: Tensor, values: Tensor, mask: Tensor | None = None, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        if mask_node is not None and mask is not None:
            ids = torch.where(mask.squeeze(-1), ids, -1)
        elif padding is not None:
            ids = torch.where(ids.eq(padding), -1, ids)
        else:
            ids = torch.where(ids < 0, ids + rows, ids)
        own = split(ids, ids_axis, batch).flatten(1)
        grads = split(values, values_axis, batch).flatten(1, -2)
        return own.to(torch.int64), grads

    return [n for n in (ids_node, values_node, mask_node) if n is not None], read


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def relabelled(x: Tensor, relabelling: tuple[Any, ...], shape: tuple[Any, ...]) -> Tensor:
    """A point's value laid out as the gradient."""
    for kind, argument in relabelling:
        x = x.permute(argument) if kind == "permute" else x.reshape(argument)
    return x.reshape(shape)
