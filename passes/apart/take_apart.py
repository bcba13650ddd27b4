"""Puts the code of a function in the place of a node that calls an op: how fused ops and our own are taken apart."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from flashdp_compile.compat import detect_fake_mode, trace
from flashdp_compile.passes.emit import inlined, signature


class TakeApart:
    """Replaces nodes of one graph, in place. Calls of one op with equal operands and settings share a trace."""

    def __init__(self) -> None:
        self._traces: dict[Any, fx.GraphModule] = {}

    def __call__(self, node: fx.Node, function: Callable[..., Any]) -> None:
        """`function` takes the arguments of `node` and gives its results; new nodes name the user's line of the op."""
        # a default that was left out, None, and False are all part of the formula: only tensors are operands
        operands = node.all_input_nodes
        values = tuple(n.meta["val"] for n in operands)
        settings = repr(fx.map_arg((node.args, node.kwargs), lambda n: f"operand {operands.index(n)}"))
        key = (node.target, settings, *map(signature, values))
        if key not in self._traces:
            with detect_fake_mode(values) or torch.no_grad():
                self._traces[key] = trace(_of_operands(node, function), values)
        _hand_over(node, inlined(self._traces[key], operands, node, node.meta))


def _of_operands(node: fx.Node, function: Callable[..., Any]) -> Callable[..., Any]:
    operands = node.all_input_nodes

    def called(*values: Tensor) -> Any:
        filled = dict(zip(operands, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), filled.__getitem__)
        return function(*args, **kwargs)

    return called


def _hand_over(node: fx.Node, results: Any) -> None:
    """Lets the users of `node` use the results; `node` goes."""
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    for use in list(node.users):
        if use.target is not operator.getitem:
            raise AssertionError(f"{node.target} has several results, and {use} takes them all")
        result = results[use.args[1]]
        if result is not None:
            use.replace_all_uses_with(result)
        node.graph.erase_node(use)  # raises if the graph uses a result that does not exist
    node.graph.erase_node(node)
