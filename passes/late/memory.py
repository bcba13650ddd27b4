"""How much memory the values of a graph take, in any order of its nodes."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set
from itertools import accumulate

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, argument, belongs_to_caller, padded_row, returns_views
from flashdp_compile.passes.order import Step

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

    Parameters and what else is the caller's are held throughout: a layer that is done leaves no room. A view is held as
    what it views, and so is a matrix that is padded in place; the values of an op with several are held one by one.

    What neither a library nor one of our kernels makes or reads is left out: Inductor fuses most of it away, and a
    softmax over a vocabulary in float32 would hide everything else. Where that is a conversion, its readers read what
    it converts.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.bytes: dict[fx.Node, int] = dict.fromkeys(graph.nodes, 0)
        self._owner: dict[fx.Node, fx.Node] = {}
        self._makes: dict[fx.Node, list[fx.Node]] = {}  # those of its values that are held by themselves
        for node in graph.nodes:
            self._owner[node] = self._viewed(node) if _is_view(node) else node
            self._makes[node] = [] if _is_element(node) else [n for n in node.users if _is_element(n)] or [node]
        for node in graph.nodes:
            kept = node.op in ("placeholder", "output") or _is_opaque(node.target)
            for value in (node, *node.all_input_nodes) if kept else ():
                for owner in self._makes[self._owner[value]] or [self._owner[value]]:
                    self.bytes[owner] = _size(owner.meta.get("val"))
        for node in graph.nodes:
            if _is_view(node) or (_is_conversion(node) and not self.bytes[node]):
                self._owner[node] = self._viewed(node)

    def _viewed(self, node: fx.Node) -> fx.Node:
        """What is held for a node that is another's view, or stands for it."""
        return self._owner[node.args[0]] if isinstance(node.args[0], fx.Node) else node

    def made(self, node: fx.Node) -> int:
        """Bytes that a node makes."""
        return sum(self.bytes[value] for value in self._makes[node])

    def peak(self, order: Sequence[Step], without: Set[fx.Node] = frozenset()) -> int:
        """The most bytes held at a time when nodes run in this order, those of a tuple at once; `without` are not run
        and make nothing."""
        return max(self.held(order, without))

    def held(self, order: Sequence[Step], without: Set[fx.Node] = frozenset()) -> list[int]:
        """The bytes held at each step of this order."""
        made: dict[fx.Node, int] = {}
        read: dict[fx.Node, int] = {}
        for at, step in enumerate(order):
            for node in step if isinstance(step, tuple) else (step,):
                if node in without:
                    continue
                for value in self._makes[node]:
                    made[value] = 0 if node.op == "placeholder" else at
                for used in (node, *node.all_input_nodes):
                    read[self._owner[used]] = at
        for value in made:
            if value.op == "placeholder" and belongs_to_caller(value):
                read[value] = len(order) - 1
        ends = self._reused(made, {value: read.get(value, at) + 1 for value, at in made.items()})
        change = [0] * (len(order) + 1)
        for value, at in made.items():
            change[at] += self.bytes[value]
            change[ends[value]] -= self.bytes[value]
        return list(accumulate(change[:-1]))

    def _reused(self, made: dict[fx.Node, int], ends: dict[fx.Node, int]) -> dict[fx.Node, int]:
        """Until when values are held if a later one of the same size takes the place of one that nobody reads any more,
        which Inductor may not free then: it does so for fewer values, and compares dtypes as well (2.13)."""
        free: dict[int, list[fx.Node]] = {}
        waiting = sorted(ends, key=lambda value: ends[value], reverse=True)
        for value, at in sorted(made.items(), key=lambda item: item[1]):
            while waiting and ends[waiting[-1]] <= at:
                gone = waiting.pop()
                free.setdefault(self.bytes[gone], []).append(gone)
            if self.bytes[value] and free.get(self.bytes[value]):
                ends[free[self.bytes[value]].pop()] = at
        return ends


def _is_conversion(node: fx.Node) -> bool:
    return node.target is torch.ops.prims.convert_element_type.default


def _is_element(node: fx.Node) -> bool:
    """One of the values of an op with several."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return isinstance(node.args[0].meta.get("val"), (tuple, list))


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args:
        return False
    if node.target is torch.ops.aten.constant_pad_nd.default:
        return _fills_its_own_row(node)
    return isinstance(node.target, OpOverload) and returns_views(node.target)


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
