"""The finished graph, judged again: every gradient that leaves it is what the guarantee says, all else is as it was.

Nothing is taken over from the rewrite. For every gradient of a parameter the graph itself must show

    release    rounding to the parameter's dtype, the scale of the loss, noise, a clipped sum, nothing in between
    noise      the stated deviation, on a stream of its own, from one key that every backward pass draws anew
    sum        over samples, all weighted by one clip_factors node, samples of weight 0 left out (`clipped.py`)
    weights    bound, clip function, divisor and scale as stated; one node for each group, used by its members only;
               where bounds move, each by the scale of its own group, and the norms within are counted
    norms      the squared norms of exactly what the group's members sum, each once (`norms.py`)
    probes     where norms are estimated: as many as stated, of one key that is drawn anew, and no two norms share any
    operands   values that the plain gradient was computed from, some at each of its points; no weights, no noise

and that no node of the model was changed. The axes pass runs a second time over the result: it proves that samples
stay apart, and finds weights by their node name in a second way.

What the graph cannot show is left to tests: that kernels compute what their names say, within their slack; that the
shares that are clipped and summed are the right function of those operands (wrong ones would be bounded all the same,
so they cost utility, not privacy); the factor R in the rounding guard of tied embeddings; and how the loss outside of
the region was formed, which no graph holds.
"""

from __future__ import annotations

from collections import Counter
from typing import NoReturn

from torch import fx

from flashdp_compile.errors import FlashDPError, InternalError
from flashdp_compile.passes.axes.engine import Axes, propagate
from flashdp_compile.passes.before import Before
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.guarantee import Guarantee
from flashdp_compile.passes.nodes import is_zero
from flashdp_compile.passes.verify.clipped import NotProved, Share
from flashdp_compile.passes.verify.graph import Graph
from flashdp_compile.passes.verify.noise import sums_behind_noise
from flashdp_compile.passes.verify.probes import check_probes
from flashdp_compile.passes.verify.unchanged import check_operands, check_unchanged
from flashdp_compile.passes.verify.weights import check_moved_bounds, check_weights

__all__ = ["verify"]


def verify(joint: JointGraph, guarantee: Guarantee, before: Before) -> Axes | None:
    """The axes of the rewritten graph; None for a batch of one sample or none, where no samples can mix.

    Raises `InternalError` if anything is not as the module's docstring says.
    """
    axes = None
    if joint.batch not in (0, 1):
        try:
            axes = propagate(joint)
        except FlashDPError as error:
            _fail(str(error))
    try:
        _judge(Graph(joint, guarantee, before, axes))
    except NotProved as reason:
        _fail(str(reason))
    return axes


def _judge(graph: Graph) -> None:
    check_unchanged(graph)
    guarantee, named = graph.guarantee, dict[str, list[int]]()
    for position, gradient in graph.before.released.items():
        named.setdefault(gradient.name, []).append(position)
    members = [name for group in guarantee.groups for name in dict.fromkeys(group.members)]
    if sorted(members) != sorted(named):
        raise NotProved(f"the groups hold {sorted(members)}, the gradients are those of {sorted(named)}")
    sums = sums_behind_noise(graph)
    if graph.joint.batch == 0:
        _check_zero(graph, sums)
        return
    owner: dict[fx.Node, str] = {}
    shares: dict[str, Counter[Share]] = {group.name: Counter() for group in guarantee.groups}
    for group in guarantee.groups:
        for position in (p for name in dict.fromkeys(group.members) for p in named[name]):
            weights, share = graph.share(position, sums[position])
            if owner.setdefault(weights, group.name) != group.name:
                name = graph.before.released[position].name
                raise NotProved(f"the gradient of {name} is weighted by the weights of group {owner[weights]}")
            shares[group.name][share] += 1
    for position, summed in sums.items():
        check_operands(graph, position, summed)
    for group in guarantee.groups:
        weights, *more = [w for w, name in owner.items() if name == group.name]
        if more:
            raise NotProved(f"the gradients of group {group.name} have several weights: {weights}, {more}")
        check_weights(graph, group, weights, shares[group.name])
    check_moved_bounds(graph, {name: weights for weights, name in owner.items()})
    check_probes(graph)
    if len(owner) != len(graph.added("clip_factors")):
        raise NotProved("there are clip weights that belong to no group")
    if graph.reader.slack > guarantee.slack:
        raise NotProved(f"norms may be off by {graph.reader.slack}, the noise allows {guarantee.slack}")


def _check_zero(graph: Graph, sums: dict[int, fx.Node]) -> None:
    """Without samples the sum is zero, whatever the graph would compute."""
    for position, node in sums.items():
        root, _ = graph.reader.values.layout(node)
        if not is_zero(root):
            raise NotProved(f"the gradient of {graph.before.released[position].name} is not zero without samples")


def _fail(what: str) -> NoReturn:
    raise InternalError(
        f"the rewritten graph failed its own verification: {what}. Nothing was released. This is a bug in "
        "flashdp_compile; please report it with the folder that options={'debug': True} writes."
    )
