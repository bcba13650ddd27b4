"""Clip weights come from the norms of just what they weigh, by the stated bound, function and divisor."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from flashdp_compile.passes.groups import Group
from flashdp_compile.passes.verify.clipped import NotProved, Share
from flashdp_compile.passes.verify.graph import Graph
from flashdp_compile.passes.verify.norms import squared_norms

aten = torch.ops.aten


def check_weights(graph: Graph, group: Group, weights: fx.Node, shares: Counter[Share]) -> None:
    """The weights of a group whose members sum these shares."""
    mechanism, scales = graph.guarantee.mechanism, graph.added("grad_scale")
    norms, *policy = weights.args
    stated = [group.bound, mechanism.clip_fn, mechanism.mean, mechanism.expected_batch_size]
    if policy[:4] != stated:  # the next two say which samples are counted, and have no part in the weights
        raise NotProved(f"the weights of group {group.name} have the bound and policy {policy}, not {stated}")
    if mechanism.bounds is None and policy[6:] != scales:
        raise NotProved(f"the weights of group {group.name} undo the scale {policy[6:]}, not {scales}")
    if mechanism.part_runs is not None:
        norms = _of_part(graph, group, norms)
    try:
        found = squared_norms(graph.reader, norms)
    except NotProved as reason:
        raise NotProved(f"the weights of group {group.name} do not come from its norms: {reason}") from None
    if found != shares:
        raise NotProved(
            f"the weights of group {group.name} come from other norms than those of its gradients: "
            f"missing {dict(shares - found)}, in excess {dict(found - shares)}"
        )


def _of_part(graph: Graph, group: Group, norms: fx.Node) -> fx.Node:
    """The norms behind those over the shares that a part has of the bound of its model."""
    if graph.added("share_bound") != [norms]:
        raise NotProved(f"the weights of group {group.name} are not those of its samples' shares of the bound")
    found, place = norms.args
    if place != graph.guarantee.mechanism.part_runs:
        raise NotProved(f"the weights of group {group.name} have the shares of another model")
    return found


def check_moved_bounds(graph: Graph, weights: dict[str, fx.Node]) -> None:
    """Each group's own scale, of this very backward, and a count of the norms that its weights are made of."""
    moving, groups = graph.guarantee.mechanism.bounds, graph.guarantee.groups
    scales, counts = graph.added("bound_scales"), graph.added("count_within")
    if [len(scales), len(counts)] != [int(moving is not None and bool(groups))] * 2:
        raise NotProved(f"bounds are moved by {scales + counts}, which is not what the options say")
    if moving is None or not groups:
        return
    (moved,), (counted,) = scales, counts
    if moved.args[1:] != (moving.place, moving.kind) or moved.args[0] not in graph.backward:
        raise NotProved("the scales of the bounds are those of another run or part, or of an earlier backward")
    if sorted(moving.groups) != sorted(weights):
        raise NotProved(f"bounds move for {moving.groups}, not for {tuple(weights)}")
    norms = [weights[name].args[0] for name in moving.groups]
    if counted.args != (moved, norms, graph.guarantee.mechanism.mean, moving.place, moving.kind):
        raise NotProved("samples within bounds are not counted by the norms of which weights are made")
    for number, name in enumerate(moving.groups):
        _, *policy = weights[name].args
        undone = [s.args for s in policy[6:] if isinstance(s, fx.Node) and s.target is aten.select.int]
        if undone not in ([(moved, 0, number)], [(counted, 0, number)]):
            raise NotProved(f"the weights of group {name} undo {policy[6:]}, not how far its bound has moved")
