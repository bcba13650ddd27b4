"""How norms, weights and the small gradients that they are made of are written in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flashdp_compile.passes.nodes import RESHAPES, is_static

aten = torch.ops.aten

SMALL = 1 << 20  # elements of all samples: a larger gradient is worth a launch of its own
LONG = 1 << 15  # elements of one sample: the kernel squares more in chains whose rounding nears 2^-20, the slack


def terms(total: fx.Node) -> list[fx.Node]:
    """What is added up to the total, in order, as far as nobody else reads the sums in between."""
    found, stack = [], [total]
    while stack:
        node = stack.pop()
        inside = node is total or len(node.users) == 1
        if inside and node.target is aten.add.Tensor and len(node.all_input_nodes) == 2 and not node.kwargs:
            stack += reversed(node.args)
        else:
            found.append(node)
    return found


def squared(norm: fx.Node, read_once: bool = True) -> fx.Node | None:
    """v, if a value is the squared norm of each sample's v, and if nobody else reads it or is allowed to."""
    squares = norm
    if norm.target is aten.sum.dim_IntList:
        squares = viewed(norm.args[0])
        if len(norm.args) != 2 or norm.kwargs or list(norm.args[1]) != [1] or norm.args[0].meta["val"].dim() != 2:
            return None
    if squares.target is not aten.pow.Tensor_Scalar or squares.args[1] != 2 or (read_once and len(norm.users) != 1):
        return None
    values = squares.args[0]
    if not isinstance(values, fx.Node) or norm.meta["val"].dim() != 1:
        return None
    if not is_small(values.meta["val"], norm.meta["val"]) or rows(values)[1] > LONG:
        return None
    return values


def viewed(node: Any) -> Any:
    """What is reshaped to a value, or the value."""
    while node.target in RESHAPES:
        node = node.args[0]
    return node


def is_small(values: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether values are those of a small vector, one for each weight."""
    return (
        all(is_static(t) and t.dtype == torch.float32 for t in (values, weights))
        and weights.dim() == 1
        and values.shape[:1] == weights.shape
        and values.is_contiguous()
        and 0 < values.numel() <= SMALL
    )


def erase(node: fx.Node) -> None:
    """A node that nobody reads, and what it alone has read."""
    unread = dict.fromkeys([node])
    while unread:
        node, _ = unread.popitem()
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        unread |= dict.fromkeys(n for n in operands if not n.users and n.op == "call_function")


def rows(node: fx.Node) -> list[int]:
    value = node.meta["val"]
    return [value.shape[0], value.numel() // value.shape[0]]
