"""Writes out loops over one dimension, `torch._higher_order_ops.map`, step by step, before any pass looks at the graph.

The backward of such a loop is one too, whose body adds a step's gradients up over the samples: rules see into neither.
Unrolled, a step is a part of the graph like any other, and the gradients of the steps meet in a sum. A loop whose
number of steps is not known, or is large, stays as it is and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashdp_compile.passes.apart.take_apart import TakeApart

MOST_STEPS = 256  # compilation takes as long as for a model with so many layers


def unroll_maps(graph: fx.Graph) -> int:
    """Replaces every loop that can be unrolled, in place; returns how many."""
    found = [n for n in graph.find_nodes(op="call_function", target=torch.ops.higher_order.map_impl) if _is_short(n)]
    for loop in found:
        body, rows, shared = loop.args
        with graph.inserting_before(loop):
            steps = graph.call_function(_steps, (rows, shared))
        steps.meta = dict(loop.meta)
        loop.replace_all_uses_with(steps)
        graph.erase_node(loop)
        TakeApart()(steps, _unrolled(getattr(graph.owning_module, body.target)))
        if not body.users:
            graph.erase_node(body)
    return len(found)


def _is_short(loop: fx.Node) -> bool:
    rows: Any = loop.args[1]
    number = rows[0].meta["val"].shape[0]
    return isinstance(number, int) and 0 < number <= MOST_STEPS


def _steps(rows: Sequence[Tensor], shared: Sequence[Any]) -> None:
    """Stands for a loop that is about to be unrolled."""


def _unrolled(body: Callable[..., Sequence[Tensor | None]]) -> Callable[..., list[Tensor | None]]:
    """The results of all steps, stacked; a step takes the rows with its number, and what all steps share."""

    def called(rows: Sequence[Tensor], shared: Sequence[Any]) -> list[Tensor | None]:
        made = [body(*(r.select(0, t) for r in rows), *shared) for t in range(rows[0].shape[0])]
        return [None if steps[0] is None else torch.stack(steps) for steps in zip(*made, strict=True)]

    return called
