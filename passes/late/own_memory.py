"""Gives tensors that are written into by index memory of their own, in graphs that Inductor is about to generate.

Inductor turns functional writes such as index_put into writes in place. The rows of an expanded tensor are one row in
memory, so a write in place puts every sample's values into all the others: samples mix after they were proved to be
apart, in the forward as well as in the backward (2.13, every device). A copy in front of the write keeps them apart,
whoever wrote the op.

This runs behind every pass that simplifies graphs, shortly before writes are made in place: Inductor drops `+ 0` and `*
1` and a copy that looks superfluous, and what was a dense tensor in the joint graph is then an expanded one. For the
same reason it believes no strides, which such passes leave as they were: it copies whatever is a view.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, returns_views

_WRITES = frozenset(
    "index_put _unsafe_index_put _unsafe_masked_index_put_accumulate index_add index_copy index_fill index_reduce "
    "scatter scatter_add scatter_reduce slice_scatter select_scatter diagonal_scatter as_strided_scatter "
    "masked_scatter put".split()
)


def own_memory(graph: fx.Graph) -> int:
    """Inserts a copy before every write into a view, in place; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "_opname", None) not in _WRITES:
            continue
        target = node.args[0]
        if isinstance(target, fx.Node) and _is_view(target):
            with graph.inserting_before(node):
                copy = graph.call_function(
                    torch.ops.aten.clone.default, (target,), {"memory_format": torch.contiguous_format}
                )
            value = target.meta["val"]
            copy.meta["val"] = value.new_empty(value.shape)
            node.args = (copy, *node.args[1:])
            count += 1
    return count


def _is_view(node: fx.Node) -> bool:
    """Whether a value may share memory with another; so may the result of anything that is not an op of torch."""
    if node.op != "call_function":
        return False  # inputs are never written into: the graph has no writes of the user's left
    if node.target is operator.getitem:
        return _is_view(node.args[0])
    return not isinstance(node.target, OpOverload) or returns_views(node.target)
