"""How much memory the values of a graph take, in any order of its nodes."""

from __future__ import annotations

import operator
from collections.abc import Set
from itertools import accumulate

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, argument, padded_row, returns_views

_CALLS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
)


class Memory:
    """The memory of a graph's values in any order of its nodes: each is held from its maker to its last reader.

    A view is held as what it views, and so is a matrix that is padded in place. What neither a library nor one of our
    kernels makes or reads is left out: Inductor fuses most of it away, and a softmax over a vocabulary in float32 would
    hide everything else.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.bytes: dict[fx.Node, int] = {}
        self._owner: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            viewed = node.args[0] if _is_view(node) else None
            self._owner[node] = self._owner[viewed] if isinstance(viewed, fx.Node) else node
            self.bytes[node] = 0
        for node in graph.nodes:
            kept = node.op in ("placeholder", "output") or _is_opaque(node.target)
            for value in (node, *node.all_input_nodes) if kept else ():
                owner = self._owner[value]
                self.bytes[owner] = _size(owner.meta.get("val"))

    def peak(self, order: list[fx.Node], without: Set[fx.Node] = frozenset()) -> int:
        """The most bytes held at a time when nodes run in this order; `without` are not run and make nothing."""
        made: dict[fx.Node, int] = {}
        read: dict[fx.Node, int] = {}
        for at, node in enumerate(order):
            if node in without:
                continue
            made.setdefault(self._owner[node], at)
            for used in (node, *node.all_input_nodes):
                read[self._owner[used]] = at
        change = [0] * (len(order) + 1)
        for node, at in made.items():
            change[0 if node.op == "placeholder" else at] += self.bytes[node]
            change[read[node] + 1] -= self.bytes[node]
        return max(accumulate(change))


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args:
        return False
    if node.target is torch.ops.aten.constant_pad_nd.default:
        return _fills_its_own_row(node)
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and returns_views(node.target))


def _fills_its_own_row(node: fx.Node) -> bool:
    """Whether Inductor pads in place: columns behind the last, where it has left room for them when it made the rows.

    For matrix products it pads a vocabulary of 50257 so, and its gradients are the largest values of a step.
    """
    matrix, padding = argument(node, "self"), argument(node, "pad")
    value, (before, behind, *others) = matrix.meta["val"], padding
    if before or any(others) or value.ndim < 2 or not all(isinstance(n, int) for n in (value.shape[-1], behind)):
        return False
    return value.shape[-1] + behind <= padded_row(value.shape[-1], value.dtype)


def _is_opaque(target: object) -> bool:
    """Whether an op is a call of its own, whose operands and results are all in memory."""
    if not isinstance(target, OpOverload):
        return False
    return target.namespace not in ("aten", "prims") or target._opname.startswith(_CALLS)


def _size(value: object) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_size, value))
    if not isinstance(value, torch.Tensor) or not all(isinstance(n, int) for n in value.shape):
        return 0
    return value.numel() * value.element_size()
