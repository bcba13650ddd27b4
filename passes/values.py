"""Which nodes of a graph hold the same value: same op, same operands, and views seen through.

Every pass writes its own copies of the views that lead to an operand, so that two kernels read the same tensor through
different nodes. Here each node gets a number, and equal numbers mean equal values. The converse does not hold: values
that are equal for deeper reasons have different numbers, and whoever asks must then refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, size_expression
from flashdp_compile.passes.axes.domain import Size, product, quotient, same

aten = torch.ops.aten

# One dimension of a view: the steps (size, stride) that it takes through its root, laid out row by row, slowest first.
Dimension = tuple[tuple[Size, Size], ...]

_SAME = (aten.alias.default, aten.clone.default, aten.detach.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class Values:
    """The numbers and layouts of all nodes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._numbers: dict[Any, int] = {}
        self._of: dict[fx.Node, int] = {}
        self._layouts: dict[fx.Node, tuple[fx.Node, tuple[Dimension, ...]]] = {}
        for node in graph.nodes:
            if node.op != "output":
                self._enter(node)

    def __getitem__(self, node: fx.Node) -> int:
        return self._of[node]

    def layout(self, node: fx.Node) -> tuple[fx.Node, tuple[Dimension, ...]]:
        """(root, dimensions): a tensor without any view upon it, and how `node` reads all of it, each element once."""
        return self._layouts.get(node, (node, plain(node)))

    def _enter(self, node: fx.Node) -> None:
        if node.op != "call_function" or _differs_by_call(node.target):
            key: Any = ("node", node)
        else:
            viewed = self._viewed(node)
            if viewed is None:
                key = (node.target, self._frozen(node.args), self._frozen(node.kwargs))
            else:
                root, dims = self._layouts[node] = viewed
                key = ("number", self._of[root]) if dims == plain(root) else ("view", self._of[root], str(dims))
        self._of[node] = key[1] if key[0] == "number" else self._numbers.setdefault(key, len(self._numbers))

    def _viewed(self, node: fx.Node) -> tuple[fx.Node, tuple[Dimension, ...]] | None:
        """The layout of a view that keeps every element, None for any other op."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        root, dims = self.layout(node.args[0])
        if node.target in _SAME:
            return root, dims
        moved = _moved(node, dims)
        return None if moved is None else (root, moved)

    def _frozen(self, argument: Any) -> Any:
        """An argument as something to compare: nodes by number, and 1, 1.0 and True apart."""
        if isinstance(argument, fx.Node):
            return "value", self._of[argument]
        if isinstance(argument, (list, tuple)):
            return tuple(self._frozen(a) for a in argument)
        if isinstance(argument, dict):
            return tuple((k, self._frozen(v)) for k, v in sorted(argument.items()))
        return type(argument).__name__, repr(argument)


def _differs_by_call(target: Any) -> bool:
    """Random numbers, and ops that write: equal arguments do not make equal results."""
    if not isinstance(target, OpOverload):
        return False
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags


def plain(node: fx.Node) -> tuple[Dimension, ...]:
    """The layout of a tensor as its own root; empty for what is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return _rows([size_expression(s) for s in value.shape])


def _rows(sizes: Sequence[Size]) -> tuple[Dimension, ...]:
    return tuple(_step(size, product(sizes[i + 1 :])) for i, size in enumerate(sizes))


def _step(size: Size, stride: Size) -> Dimension:
    return () if same(size, 1) else ((size, stride),)


def _moved(node: fx.Node, dims: tuple[Dimension, ...]) -> tuple[Dimension, ...] | None:
    """What a permutation or reshape makes of the dimensions of its operand."""
    target, rank = node.target, len(dims)
    arguments: tuple[Any, ...] = node.args
    if target in _RESHAPES:
        return _regrouped(dims, [_size(s) for s in arguments[1]])
    if target is aten.permute.default:
        return tuple(dims[d] for d in arguments[1])
    if target is aten.t.default:
        return dims[::-1]
    if target is aten.transpose.int:
        order = list(range(rank))
        a, b = (int(d) % rank for d in arguments[1:3])
        order[a], order[b] = b, a
        return tuple(dims[d] for d in order)
    if target is aten.unsqueeze.default:
        at = arguments[1] % (rank + 1)
        return (*dims[:at], (), *dims[at:])
    if target in (aten.squeeze.dim, aten.squeeze.dims):
        given = arguments[1] if target is aten.squeeze.dims else [arguments[1]]
        dropped = {d % rank for d in given}
        return tuple(dim for i, dim in enumerate(dims) if i not in dropped or dim)
    return None


def _size(argument: Any) -> Size:
    return size_expression(argument.meta["val"] if isinstance(argument, fx.Node) else argument)


def _regrouped(dims: tuple[Dimension, ...], shape: Sequence[Size]) -> tuple[Dimension, ...] | None:
    """The same elements in the same order under another shape; None where a step cannot be cut as it would have to."""
    steps = [step for dim in dims for step in dim]
    inferred = next((i for i, size in enumerate(shape) if size == -1), None)
    if inferred is not None:
        whole = quotient(product([s for s, _ in steps]), product([s for s in shape if s != -1]))
        if whole is None:
            return None
        shape = [*shape[:inferred], whole, *shape[inferred + 1 :]]
    result: list[Dimension] = []
    for wanted in reversed(shape):
        dim: list[tuple[Size, Size]] = []
        while not same(wanted, 1):
            if not steps:
                return None
            size, stride = steps.pop()
            rest = quotient(wanted, size)
            if rest is None:
                outer = quotient(size, wanted)
                if outer is None:
                    return None
                steps.append((outer, stride * wanted))
                size, rest = wanted, 1
            dim.insert(0, (size, stride))
            wanted = rest
        result.insert(0, _merged(dim))
    return None if steps else tuple(result)


def laid_out(sizes: Sequence[Size], relabelling: Sequence[tuple[str, Any]]) -> tuple[Dimension, ...] | None:
    """How permutations and views read a tensor of these sizes; None if a view cuts across what a permutation moved."""
    dims: tuple[Dimension, ...] | None = _rows(sizes)
    for kind, argument in relabelling:
        if dims is not None:
            dims = tuple(dims[d] for d in argument) if kind == "permute" else _regrouped(dims, argument)
    return dims


def _merged(dim: list[tuple[Size, Size]]) -> Dimension:
    """Two steps as one where the slower goes on where the faster ends."""
    merged: list[tuple[Size, Size]] = []
    for size, stride in dim:
        if merged and same(merged[-1][1], size * stride):
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)
