"""What the rewrite had no business with is as it was, and what it made is made of the operands of plain gradients."""

from __future__ import annotations

import operator

import torch
from torch import fx

from flashdp_compile.compat import OpOverload
from flashdp_compile.passes.axes.domain import Batched, Constant
from flashdp_compile.passes.before import has
from flashdp_compile.passes.verify.clipped import NotProved
from flashdp_compile.passes.verify.graph import Graph


def check_unchanged(graph: Graph) -> None:
    """The model's nodes, the other outputs, and no op beside them that would write somewhere."""
    known, kept, axes = graph.before.nodes, graph.before.kept, graph.axes
    if len(graph.results) != len(kept) + len(graph.before.released):
        raise NotProved("the number of outputs has changed")
    for position, node in kept.items():
        if graph.results[position] is not node:
            raise NotProved(f"output {position} was replaced, which is no gradient of a parameter")
        if axes is None or not isinstance(node, fx.Node):
            continue
        a_gradient = any(g.position == position for g in graph.joint.gradients)
        if a_gradient and not isinstance(axes[node], (Batched, Constant)):
            raise NotProved(f"output {position} ({node}) carries a sum over samples that was not clipped")
    for node in graph.joint.graph.nodes:
        if node in known:
            if (node.target, node.args, node.kwargs) != known[node]:
                raise NotProved(f"{node}, a node of the model, was changed")
        elif node.op != "output" and not _is_pure(node):
            raise NotProved(f"{node} ({node.target}) may do more than return a value")


def check_operands(graph: Graph, position: int, summed: fx.Node) -> None:
    """A clipped sum is made of what its plain gradient was made of, with something from each point."""
    points, name = graph.before.operands[position], graph.before.released[position].name
    found, seen, queue, clips = set(), {summed}, [summed], graph.added("clip_factors")
    while queue:
        node = queue.pop()
        if node in graph.before.nodes:
            if graph.axes is None or has(graph.axes.states.get(node), Batched):
                found.add(node)
        elif node not in clips and not isinstance(node.meta.get("val"), (int, torch.SymInt)):
            further = [n for n in node.all_input_nodes if n not in seen]
            seen.update(further)
            queue.extend(further)
    strange = found - frozenset().union(*points)
    if strange:
        raise NotProved(f"the gradient of {name} is made of {strange}, which its plain gradient is not")
    if not all(point & found for point in points):
        raise NotProved(f"a part of the gradient of {name} is missing: one of {points} is not read")


def _is_pure(node: fx.Node) -> bool:
    """An op of torch that writes nowhere, a part of its result, or arithmetic on sizes."""
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return node.target is operator.getitem or isinstance(node.meta.get("val"), (int, torch.SymInt))
