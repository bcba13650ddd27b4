"""What several passes ask of a graph's values, and how they write calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import detect_fake_mode

aten = torch.ops.aten

# ops that keep all elements and their row-major order
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)


def is_static(value: torch.Tensor) -> bool:
    """Whether sizes, strides and the place in the storage are numbers, known before the program runs."""
    return all(isinstance(n, int) for n in (*value.shape, *value.stride(), value.storage_offset()))


def call(graph: fx.Graph, op: Callable[..., Any], *args: Any) -> fx.Node:
    """A call at the graph's insertion point, with its fake value."""
    node = graph.call_function(op, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    with detect_fake_mode(values) or nullcontext():
        node.meta["val"] = op(*values)
    return node


def per_dimension(setting: list[int], rank: int) -> list[int]:
    """A setting of a convolution, of which one number may stand for all dimensions."""
    return list(setting) * rank if len(setting) == 1 else list(setting)


def is_zero(node: Any) -> bool:
    """Whether a node makes a tensor of zeros out of nothing."""
    if not isinstance(node, fx.Node) or node.all_input_nodes:
        return False
    filled: dict[Any, int] = {torch.ops.aten.full.default: 1, torch.ops.aten.scalar_tensor.default: 0}
    return node.target in filled and node.args[filled[node.target]] == 0
