"""The graph that is judged, with what all claims about it are read from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from flashdp_compile.passes.axes.domain import Reduced
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.before import Before
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.guarantee import Guarantee
from flashdp_compile.passes.values import Values
from flashdp_compile.passes.verify.clipped import NotProved, Reader, Share

# ops that only a rewrite adds: what a sum is made of depends on none of them
MADE = (
    *("clip_factors", "share_bound", "draw_key", "add_noise", "grad_scale"),
    *("bound_scales", "count_within", "draw_probe_key"),
)


class Graph:
    """A rewritten graph, the guarantee that it must keep, and how it was before.

    `axes` is None for a batch of one sample or none. `backward`: all that depends on a tangent. A key that does not
    could be drawn in the forward pass, once for several backward passes.
    """

    def __init__(self, joint: JointGraph, guarantee: Guarantee, before: Before, axes: Axes | None) -> None:
        self.joint, self.guarantee, self.before, self.axes = joint, guarantee, before, axes
        self.results = joint.output.args[0]
        self.backward = _downstream(joint.graph, joint.tangents)
        tainted = _downstream(joint.graph, [node for name in MADE for node in self.added(name)])
        self.reader = Reader(Values(joint.graph), tainted, single=joint.batch == 1)

    def added(self, name: str) -> list[fx.Node]:
        """The calls of one of our ops that the graph did not have before."""
        calls = self.joint.graph.find_nodes(op="call_function", target=getattr(torch.ops.flashdp, name).default)
        return [node for node in calls if node not in self.before.nodes]

    def share(self, position: int, summed: fx.Node) -> tuple[fx.Node, Share]:
        """The weights of a clipped sum, and what one sample adds to it, by what it says and by its axes."""
        name = self.before.released[position].name
        if self.axes is not None:
            state = self.axes[summed]
            if not isinstance(state, Reduced) or state.weight is None:
                raise NotProved(f"the gradient of {name} is not a clipped sum ({state})")
        try:
            weights, share = self.reader.clipped_sum(summed)
        except NotProved as reason:
            raise NotProved(f"the gradient of {name} is not a clipped sum: {reason}") from None
        if self.axes is not None and self.axes[summed].weight != weights.name:
            raise NotProved(f"the gradient of {name} is weighted by {self.axes[summed].weight}, not by {weights}")
        return weights, share


def _downstream(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The sources and all that depends on them."""
    found = set(sources)
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
