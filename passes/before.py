"""What `verify` remembers of a graph from before its rewriting: what must not change, what gradients are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from flashdp_compile.passes.axes.domain import Batched, Constant, Reduced
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.capture import Gradient, JointGraph


@dataclass(frozen=True)
class Before:
    """A graph that is about to be rewritten.

    `kept`: what must not change, that is forward outputs and gradients of inputs that hold samples, by position.
    `released`: the gradients that will be replaced, by position. `nodes`: op and arguments of every node.
    `operands`: for every released position, of each of its points what holds samples.
    """

    kept: dict[int, Any]
    released: dict[int, Gradient]
    nodes: dict[fx.Node, tuple[Any, Any, Any]]
    operands: dict[int, tuple[frozenset[fx.Node], ...]]

    @staticmethod
    def of(joint: JointGraph, axes: Axes | None = None) -> Before:
        """`axes` is None for a batch of one sample or none, whose gradients are taken whole."""
        released = {g.position: g for g in joint.gradients if not _stays_per_sample(joint, axes, g)}
        kept = {i: n for i, n in enumerate(joint.output.args[0]) if i not in released}
        nodes = {n: (n.target, n.args, n.kwargs) for n in joint.graph.nodes if n.op != "output"}
        operands = {i: (frozenset([g.node]),) if axes is None else _operands(axes, g.node) for i, g in released.items()}
        return Before(kept, released, nodes, operands)


def _stays_per_sample(joint: JointGraph, axes: Axes | None, gradient: Gradient) -> bool:
    of_samples = joint.inputs[gradient.index].role == "sample"
    return of_samples and (axes is None or isinstance(axes[gradient.node], (Batched, Constant)))


def _operands(axes: Axes, gradient: fx.Node) -> tuple[frozenset[fx.Node], ...]:
    """What holds samples among the operands of every node where they are summed on the way to a gradient."""
    points, seen, queue = [], {gradient}, [gradient]
    while queue:
        node = queue.pop()
        states = {n: axes.states.get(n) for n in node.all_input_nodes}
        holding = frozenset(n for n, s in states.items() if has(s, Batched) and not has(s, Reduced))
        if holding:
            points.append(holding)
        further = [n for n, s in states.items() if has(s, Reduced) and n not in seen]
        seen.update(further)
        queue.extend(further)
    return tuple(points)


def has(state: Any, kind: type) -> bool:
    """Whether a state, or one of several, is of a kind."""
    return any(isinstance(s, kind) for s in (state if isinstance(state, tuple) else (state,)))
