"""The sweep: gives every value of the joint graph its state, or refuses the graph.

The engine decides alone in every case that does not depend on the op: constants in, constants out; a sum over samples
that meets a sample is refused; a function of sums is a sum if the op is linear, and mixed otherwise. Only an op whose
tensor arguments are samples and constants needs a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import flashdp_compile.passes.axes.rules_attention
import flashdp_compile.passes.axes.rules_bags
import flashdp_compile.passes.axes.rules_conv
import flashdp_compile.passes.axes.rules_fft
import flashdp_compile.passes.axes.rules_flashdp
import flashdp_compile.passes.axes.rules_index
import flashdp_compile.passes.axes.rules_linalg
import flashdp_compile.passes.axes.rules_matmul
import flashdp_compile.passes.axes.rules_pointwise
import flashdp_compile.passes.axes.rules_reduce
import flashdp_compile.passes.axes.rules_scatter
import flashdp_compile.passes.axes.rules_views  # noqa: F401
from flashdp_compile.compat import OpOverload, size_expression
from flashdp_compile.passes.axes.domain import (
    CONSTANT,
    ZERO,
    Batched,
    Constant,
    Mixed,
    Reduced,
    Reject,
    Site,
    State,
    merge,
    product,
    same,
)
from flashdp_compile.passes.axes.registry import LINEAR, NO_DATA, lookup
from flashdp_compile.passes.axes.rules_views import is_structural
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.refuse import refuse

States = dict[fx.Node, Any]  # a state for a tensor, a tuple of states for several
Draws = dict[fx.Node, Batched]  # random numbers of which each sample has its own


@dataclass(frozen=True)
class Axes:
    """The states of all values of one joint graph. `met`: see `Site`."""

    joint: JointGraph
    states: States = field(default_factory=dict)
    met: dict[tuple[fx.Node, fx.Node], Batched] = field(default_factory=dict)

    def __getitem__(self, node: fx.Node) -> Any:
        return self.states[node]

    def seen_by(self, reader: fx.Node, node: fx.Node) -> Any:
        """The state of a value as its reader sees it: a constant with an element for each sample is read like samples.

        A table of ids that is the same for all samples may be stored once for each: `ids.expand(B, -1)`.
        """
        return self.met.get((reader, node), self.states.get(node))


def propagate(joint: JointGraph, axes: Axes | None = None) -> Axes:
    """The axes of a joint graph. Raises `Refusal`, naming op and source line, if samples may mix.

    Tangents take the state of the forward output they belong to: a loss outside of the graph is assumed to be a sum
    of per-sample losses (times a constant). They are known only after the forward part, hence the two sweeps.
    `axes`, of this graph and empty, is filled on the way: after a refusal it holds what was known by then.

    Random numbers are constants until one meets the batch as if each sample had its own (a dropout mask). Then they are
    per sample wherever they are used, so all states are found again.
    """
    axes = Axes(joint) if axes is None else axes
    draws: Draws = {}
    while True:
        known = len(draws)
        axes.states.clear()
        axes.met.clear()
        _sweep(axes, draws)
        if len(draws) == known:
            return axes


def _sweep(axes: Axes, draws: Draws) -> None:
    """Fills in the states, given what is known of random numbers; more may be found out on the way."""
    joint, states = axes.joint, axes.states
    late: list[fx.Node] = []
    waiting: set[fx.Node] = set(joint.tangents)
    for node in joint.graph.nodes:
        if node.op == "output":
            continue
        if node in waiting or any(n in waiting for n in node.all_input_nodes):
            waiting.add(node)
            late.append(node)
        else:
            states[node] = _state(axes, node, draws)
    for node in late:
        states[node] = _tangent(joint, node, states) if node in joint.tangents else _state(axes, node, draws)


def _tangent(joint: JointGraph, tangent: fx.Node, states: States) -> State:
    output = joint.tangents[tangent]
    state = states[output]
    if isinstance(state, Batched):
        return state
    if isinstance(state, Reduced) and output.meta["val"].numel() != 1:
        refuse(
            output,
            joint,
            f"output {output.name} is a sum over the batch with more than one element, so a loss computed from it "
            "outside of the compiled region may combine samples",
            "return per-sample values, or one scalar loss",
        )
    if isinstance(state, Mixed):
        refuse(output, joint, f"the loss depends on several samples at once: {state.why}", _LOSS_FIX)
    return CONSTANT


_LOSS_FIX = (
    "return one loss per sample (flashdp_compile.sequence_losses(logits, labels) for a language model, else "
    "reduction='none', then a mean over each sample's own elements) and let their mean or sum be taken outside of the "
    "model or as the last step"
)


def _state(axes: Axes, node: fx.Node, draws: Draws) -> Any:
    joint, states = axes.joint, axes.states
    if node.op == "placeholder":
        dim = joint.samples.get(node)
        return CONSTANT if dim is None else Batched(dim % node.meta["val"].dim())
    if node.op != "call_function":
        return CONSTANT
    if node in draws:
        return _every(node, draws[node])
    if node.target is operator.getitem:
        parent = states[node.args[0]]
        return parent[node.args[1]] if isinstance(parent, tuple) else parent
    given = [states[n] for n in node.all_input_nodes]
    flat = [s for g in given for s in (g if isinstance(g, tuple) else (g,))]
    if node.target in NO_DATA or all(isinstance(s, Constant) for s in flat):
        return _constant(node, flat)
    if any(isinstance(s, Batched) for s in flat):
        for culprit in (n for n in node.all_input_nodes if isinstance(states[n], (Reduced, Mixed))):
            _refuse_mixing(joint, node, culprit, states[culprit])
        return _checked(joint, node, _apply(axes, node, draws))
    mixed = [s for s in flat if isinstance(s, Mixed)]
    if mixed:
        return _every(node, mixed[0])
    return _linear(node, states, [s for s in flat if isinstance(s, Reduced)])


def _every(node: fx.Node, state: State) -> Any:
    value = node.meta.get("val")
    return (state,) * len(value) if isinstance(value, (tuple, list)) else state


def _constant(node: fx.Node, given: list[State]) -> Any:
    """Zero if the op creates zeros, or only moves or weakly combines zeros."""
    if isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "prims"):
        name = node.target._opname
        creates_zero: Any = name in ("zeros", "zeros_like", "new_zeros")
        creates_zero |= (name == "full" and node.args[1] == 0) or (name == "scalar_tensor" and node.args[0] == 0)
        filled = name in ("full_like", "new_full") and node.args[-1] == 0
        moves_zero = bool(given) and given[0] == ZERO and is_structural(node.target)
        if creates_zero or filled or moves_zero:
            return _every(node, ZERO)
    return _every(node, CONSTANT)


def _linear(node: fx.Node, states: States, reduced: list[Reduced]) -> Any:
    """A function of batch sums and constants: a batch sum itself if the op is linear in the sums."""
    linear = LINEAR.get(node.target)
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: states[n] if _is_tensor(n) else n)
    value = node.meta.get("val")
    rounds = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    if linear is not None and not rounds:
        try:
            is_linear = linear(*arguments[0], **arguments[1])
        except TypeError:  # an overload with arguments that the predicate does not know
            is_linear = False
        if is_linear:
            return _every(node, merge(reduced))
    if getattr(node.target, "_opname", "") in ("add", "sub", "cat", "stack", "slice_scatter", "select_scatter"):
        return _every(node, Mixed("it has a term that does not depend on the samples"))
    return _every(node, Mixed(f"{node.target} of a sum over the batch ({', '.join(map(str, reduced[0].points))})"))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _apply(axes: Axes, node: fx.Node, draws: Draws) -> Any:
    joint, states = axes.joint, axes.states
    rule = lookup(node.target)
    if rule is None:
        refuse(
            node,
            joint,
            f"flashdp has no rule that says where {node.target} keeps the samples",
            "express it with ops that have one, or add a rule (docs/adding-a-rule.md)",
        )
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: states[n] if _is_tensor(n) else n)
    try:
        return rule(Site(node, joint.batch, draws, axes.met), *arguments[0], **arguments[1])
    except Reject as reject:
        refuse(node, joint, reject.reason, reject.fix)


def _checked(joint: JointGraph, node: fx.Node, state: Any) -> Any:
    """A claimed batch dimension must have the size outer*B*inner; whatever slipped through a rule stops here."""
    values, claims = node.meta["val"], state
    if not isinstance(values, (tuple, list)):
        values, claims = (values,), (claims,)
    for value, claim in zip(values, claims, strict=True):
        if not isinstance(claim, Batched) or not isinstance(value, torch.Tensor):
            continue
        sizes = [size_expression(s) for s in value.shape]
        inside = 0 <= claim.dim < len(sizes)
        if not inside or not same(sizes[claim.dim], product([claim.outer, joint.batch, claim.inner])):
            refuse(node, joint, f"its result has lost the samples (claimed {claim}, sizes {sizes})", _LOST_FIX)
    return state


_LOST_FIX = "keep the batch a dimension of its own"


def _refuse_mixing(joint: JointGraph, node: fx.Node, culprit: fx.Node, state: Reduced | Mixed) -> None:
    mean = "its divisor is a count over the batch" if _is_count(culprit) else None
    reason = (
        f"it joins per-sample values with a value computed from the whole batch ({state})"
        if mean is None
        else f"the loss is divided by a count over the whole batch ({state}), so each sample's loss depends on all"
    )
    refuse(node, joint, reason, _COUNT_FIX if mean else _MIX_FIX)


def _is_count(node: fx.Node) -> bool:
    """Whether a batch sum counts conditions: the number of tokens that are not ignored, for one."""
    seen: Callable[[fx.Node], bool] = lambda n: (  # noqa: E731
        isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].dtype in (torch.bool, torch.int64)
    )
    while isinstance(node, fx.Node) and node.op == "call_function":
        value = node.meta.get("val")
        if any(seen(n) for n in node.all_input_nodes) and isinstance(value, (torch.Tensor, torch.SymInt)):
            if isinstance(value, torch.SymInt) or not value.is_floating_point():
                return True
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
        if seen(node):
            return True
    return False


_MIX_FIX = (
    "normalise within a sample (LayerNorm, GroupNorm, RMSNorm, x.mean(-1)), or use a constant that was fixed before "
    "this batch (BatchNorm in eval mode)"
)
_COUNT_FIX = (
    "(1) return per-sample losses: flashdp_compile.sequence_losses(logits, labels) for a language model, else "
    "cross_entropy(..., reduction='none'), then for each sample its own sum over its own count; or (2) compute the "
    "loss outside of the compiled region from the logits, divided by a constant"
)
