"""The finished graph, judged again: every gradient that leaves it is a clipped sum with noise, all else is as it was.

The axes pass runs a second time, over the rewritten graph. It knows clip weights by the node that made them and follows
them through products and sums, so a gradient whose samples are not all weighted by its own group's weights is found,
whichever strategy wrote it. That the weights come from the right norms is for the tests to show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashdp_compile.errors import FlashDPError, InternalError
from flashdp_compile.passes.axes.domain import Batched, Constant, Reduced
from flashdp_compile.passes.axes.engine import Axes, propagate
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.plan import Plan


@dataclass(frozen=True)
class Before:
    """What must not change: the forward outputs and the gradients of inputs that hold samples, by position."""

    kept: dict[int, Any]

    @staticmethod
    def of(joint: JointGraph, rewritten: set[int]) -> Before:
        """The outputs of a graph that is about to be rewritten, but for the positions that will be."""
        results = joint.output.args[0]
        return Before({i: n for i, n in enumerate(results) if i not in rewritten})


def verify(joint: JointGraph, plan: Plan, before: Before, noise: bool) -> Axes:
    """The axes of the rewritten graph. Raises `InternalError` if any output is not what it must be."""
    try:
        axes = propagate(joint)
    except FlashDPError as error:
        raise InternalError(
            f"the rewritten graph failed its own verification; nothing was released.\n{error}"
        ) from None
    results = joint.output.args[0]
    for position, node in before.kept.items():
        if results[position] is not node:
            _fail(f"output {position} was replaced, which is no gradient of a parameter")
    owner: dict[str, str] = {}
    streams: set[int] = set()
    for group in plan.groups:
        for choice in plan.choices[group.name]:
            node = results[choice.gradient.gradient.position]
            name = choice.gradient.name
            state = axes[node]
            if not isinstance(state, Reduced) or state.weight is None:
                _fail(f"the gradient of {name} is not a clipped sum ({state})")
            if owner.setdefault(state.weight, group.name) != group.name:
                _fail(f"the gradient of {name} is weighted by the weights of group {owner[state.weight]}")
            if noise:
                stream = _noise_stream(node, name)
                if stream in streams:
                    _fail(f"the gradient of {name} would get the noise of another parameter")
                streams.add(stream)
    for position, node in before.kept.items():
        if position >= len(joint.outputs) and isinstance(node, fx.Node) and node in axes.states:
            if not isinstance(axes[node], (Batched, Constant)):
                _fail(f"output {position} ({node}) carries a sum over samples that was not clipped")
    return axes


_AFTER_NOISE = (torch.ops.aten.div.Tensor, torch.ops.aten.mul.Tensor, torch.ops.prims.convert_element_type.default)


def _noise_stream(node: fx.Node, name: str) -> int:
    """The stream of the noise op that a gradient ends in; only scaling by constants may follow it."""
    while node.target in _AFTER_NOISE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is not torch.ops.flashdp.add_noise.default:
        _fail(f"the gradient of {name} leaves the graph without noise (it ends in {node.target})")
    return node.args[2]


def _fail(what: str) -> None:
    raise InternalError(
        f"the rewritten graph failed its own verification: {what}. Nothing was released. This is a bug in "
        "flashdp_compile; please report it with the folder that options={'debug': True} writes."
    )
