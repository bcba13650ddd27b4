"""Gives values that are written into by index memory of their own.

An expanded tensor has stride 0: its rows are one row in memory. Inductor (2.13, on a CPU) turns functional writes such
as index_put into writes in place, and then all rows of an expanded operand become one: samples would mix after they
were proved to be apart. A copy in front of the write keeps them apart, whoever wrote the op.
"""

from __future__ import annotations

import torch
from torch import fx

_WRITES = frozenset(
    "index_put _unsafe_index_put _unsafe_masked_index_put_accumulate index_add index_copy index_fill index_reduce "
    "scatter scatter_add scatter_reduce slice_scatter select_scatter diagonal_scatter as_strided_scatter "
    "masked_scatter put".split()
)


def own_memory(graph: fx.Graph) -> int:
    """Inserts a copy before every write into an expanded tensor, in place; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "_opname", None) not in _WRITES:
            continue
        target = node.args[0]
        if isinstance(target, fx.Node) and _expanded(target.meta.get("val")):
            with graph.inserting_before(node):
                copy = graph.call_function(
                    torch.ops.aten.clone.default, (target,), {"memory_format": torch.contiguous_format}
                )
            value = target.meta["val"]
            copy.meta["val"] = value.new_empty(value.shape)
            node.args = (copy, *node.args[1:])
            count += 1
    return count


def _expanded(value: object) -> bool:
    """Whether several elements share memory. A stride of 0 on a dimension of size one is harmless."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    strides = zip(value.shape, value.stride(), strict=True)
    return any(isinstance(s, int) and s == 0 and not (isinstance(n, int) and n <= 1) for n, s in strides)
