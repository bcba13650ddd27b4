"""The one pass that changes the graph: norms, clip weights, weighted sums and noise take the place of plain gradients.

For every clipping group: squared norms of its members are added up, `flashdp::clip_factors` turns them into one weight
per sample, and each member's gradient becomes the weighted sum. `flashdp::add_noise` then makes it a release. The plain
gradient is no longer an output, so dead-code elimination removes whatever computed only it.

Where a GradScaler scales the loss, weights undo that, so that the sum and its noise are those of plain losses; what is
released is scaled again, as the scaler expects it. Where bounds move, a group is clipped as if its loss had been scaled
by how far its bound has, and it is left at that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from flashdp_compile.errors import Refusal
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.capture import Gradient, JointGraph
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.groups import Group, sensitivity
from flashdp_compile.passes.mechanism import Mechanism
from flashdp_compile.passes.plan import Plan
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Prepared, accumulation_dtype, widened
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.passes.strategies.shared import prepare_shared

ops = torch.ops.flashdp
Released = list[tuple[int, fx.Node]]


def rewrite(axes: Axes, plan: Plan, mechanism: Mechanism) -> None:
    """Replaces every parameter gradient of the joint graph, in place."""
    emit = Emitter(axes.joint)
    released: Released = []
    if plan.estimates:
        anchor = _anchor(axes.joint, private_gradients(axes.joint)[0].node)
        emit.probe_key = emit(lambda a: ops.draw_probe_key(a, mechanism.seed, mechanism.held_probes), anchor)
    prepared = [_prepare(emit, axes, plan, group.name) for group in plan.groups]
    norms = [[p.sqnorm for _, p in members if p.sqnorm is not None] for members in prepared]
    scale = _scale(emit, axes.joint, mechanism)
    for members, weights in zip(prepared, _clip(emit, axes.joint, plan.groups, norms, mechanism, scale), strict=True):
        released += [(g.gradient.position, p.finish(weights)) for g, p in members]
    _release(emit, axes.joint, released, mechanism, _std(mechanism, plan.groups, plan.slack), scale)


def _prepare(emit: Emitter, axes: Axes, plan: Plan, group: str) -> list[tuple[ParameterGradient, Prepared]]:
    """The first half of every strategy of a group; inputs that layers share are treated once."""
    choices = {c.gradient.name: c for c in plan.choices[group]}
    prepared: list[tuple[ParameterGradient, Prepared]] = []
    for run in plan.shared.get(group, ()):
        chosen = [choices.pop(name) for name in run.names]
        gradients, together = [c.gradient for c in chosen], chosen[0].strategy.together
        assert together is not None
        prepared += zip(gradients, prepare_shared(emit, axes, together, gradients, run.sides), strict=True)
    return prepared + [(c.gradient, c.strategy.prepare(emit, axes, c.gradient)) for c in choices.values()]


def rewrite_empty(joint: JointGraph, groups: tuple[Group, ...], mechanism: Mechanism) -> None:
    """The release of a batch without samples: zero, and the noise that every release carries."""
    emit = Emitter(joint)
    zeros = [(g.position, emit(_zeros, g.node)) for g in private_gradients(joint)]
    _release(emit, joint, zeros, mechanism, _std(mechanism, groups, 0.0), _scale(emit, joint, mechanism))


def rewrite_single(joint: JointGraph, groups: tuple[Group, ...], mechanism: Mechanism) -> None:
    """The release of a batch of one sample: its whole gradient is the per-sample gradient, so it is clipped as it is.

    No sample can mix with another, and dimensions of size one leave nothing to prove.
    """
    emit = Emitter(joint)
    private = {g.name: g for g in private_gradients(joint)}
    released: Released = []
    norms = [[emit(_sqnorm_of_one, private[name].node) for name in group.members] for group in groups]
    scale = _scale(emit, joint, mechanism)
    for group, weights in zip(groups, _clip(emit, joint, groups, norms, mechanism, scale), strict=True):
        released += [(private[n].position, emit(_weigh_one, private[n].node, weights)) for n in group.members]
    _release(emit, joint, released, mechanism, _std(mechanism, groups, MATERIALIZE.slack), scale)


def _std(mechanism: Mechanism, groups: tuple[Group, ...], slack: float) -> float:
    """sigma * C (1 + slack), over L where L is known in advance."""
    std = mechanism.noise_multiplier * sensitivity(groups) * (1 + slack)
    return std / mechanism.expected_batch_size if mechanism.mean and mechanism.expected_batch_size else std


def _zeros(gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient, dtype=accumulation_dtype(gradient.dtype))


def _sqnorm_of_one(gradient: Tensor) -> Tensor:
    return widened(gradient).square().sum().reshape(1)


def _weigh_one(gradient: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights != 0, widened(gradient) * weights, 0.0).reshape(gradient.shape)


def private_gradients(joint: JointGraph) -> list[Gradient]:
    """The gradients that leave the graph for a parameter, not for an input that holds samples."""
    return [g for g in joint.gradients if joint.inputs[g.index].role != "sample"]


def check_all_owed(joint: JointGraph) -> None:
    """Raises Refusal for a clipped gradient that is no parameter's: nobody would add the noise that it is to have at
    the step, and what made the input would pass it on, to parameters of which each sample moves many rows."""
    for gradient in joint.gradients:
        if joint.inputs[gradient.index].role not in ("parameter", "sample"):
            raise Refusal(
                f"'{gradient.name}' holds no samples, and requires a gradient, which would leave the graph without "
                "noise: an engine adds that to parameters. Detach it, or make it in the module that uses it, such as "
                "learned positions next to what they are added to"
            )


def _scale(emit: Emitter, joint: JointGraph, mechanism: Mechanism) -> fx.Node | None:
    """What the loss was multiplied by, looked up in every backward; None for a loss that nobody scales."""
    number = mechanism.grad_scaler
    private = private_gradients(joint)
    if number is None or not private:
        return None
    return emit(lambda anchor: ops.grad_scale(anchor, number), _anchor(joint, private[0].node))


def _clip(
    emit: Emitter,
    joint: JointGraph,
    groups: tuple[Group, ...],
    norms: list[list[fx.Node]],
    mechanism: Mechanism,
    scale: fx.Node | None,
) -> Iterator[fx.Node]:
    """The weights of every group, from the squared norms of its members.

    The first group, which backward reaches last as a rule, counts the samples that are not finite in any group; the
    others need not wait for it.
    """
    totals = [emit(_added, *members) for members in norms]
    if (place := mechanism.part_runs) is not None:
        totals = [emit(lambda total: ops.share_bound(total, place), total) for total in totals]
    scales = [scale] * len(groups) if mechanism.bounds is None else _moved(emit, joint, groups, totals, mechanism)
    for number, (group, total, own) in enumerate(zip(groups, totals, scales, strict=True)):
        others = [] if number else totals[1:]
        weights = _weights(group.bound, mechanism, counts=number == 0, scaled=own is not None)
        yield emit(weights, total, *others, *([] if own is None else [own]))


def _moved(
    emit: Emitter, joint: JointGraph, groups: tuple[Group, ...], totals: list[fx.Node], mechanism: Mechanism
) -> list[fx.Node]:
    """How far the bound of each group has moved. The first group, which waits for all norms anyway, also has counted
    who lies within."""
    assert mechanism.bounds is not None
    place, names, kind = mechanism.bounds
    norms = dict(zip((group.name for group in groups), totals, strict=True))
    scales = emit(lambda anchor: ops.bound_scales(anchor, place, kind), _anchor(joint, totals[0]))
    counted = emit(
        lambda s, *norms: ops.count_within(s, norms, mechanism.mean, place, kind),
        scales,
        *(norms[name] for name in names),
    )
    numbers = [names.index(group.name) for group in groups]
    return [emit(_element(number), scales if k else counted) for k, number in enumerate(numbers)]


def _element(number: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values[number]


def _added(first: Tensor, *rest: Tensor) -> Tensor:
    for norm in rest:
        first = first + norm
    return first


def _weights(bound: float, mechanism: Mechanism, counts: bool, scaled: bool) -> Callable[..., Tensor]:
    def weights(total: Tensor, *others: Tensor) -> Tensor:
        policy = bound, mechanism.clip_fn, mechanism.mean, mechanism.expected_batch_size
        others, scale = (others[:-1], others[-1:]) if scaled else (others, ())
        return ops.clip_factors(total, *policy, counts, torch.stack(others, 1) if others else None, *scale)

    return weights


def _release(
    emit: Emitter, joint: JointGraph, released: Released, mechanism: Mechanism, std: float, scale: fx.Node | None
) -> None:
    if mechanism.noise_multiplier > 0 and released:
        released = _noised(emit, joint, released, mechanism, std)
    if scale is not None:
        released = [(at, emit(torch.mul, node, scale)) for at, node in released]
    results = list(joint.output.args[0])
    for position, node in released:
        results[position] = node if mechanism.owed else _as(emit, node, results[position].meta["val"].dtype)
    joint.output.args = (tuple(results),)
    emit.settle()
    joint.graph.eliminate_dead_code()
    joint.graph.lint()


def _as(emit: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Rounds to the parameter's dtype last of all: rounding the sum before its noise would let one sample move it."""
    if node.meta["val"].dtype == dtype:
        return node
    return emit(lambda wide: wide.to(dtype), node, key=("cast", dtype))


def _noised(emit: Emitter, joint: JointGraph, released: Released, mechanism: Mechanism, std: float) -> Released:
    """Noise from one key for the whole release; `stream` numbers its parameters.

    The key hangs on a tangent where it can, so that it is drawn in the backward pass, a new one for every backward, and
    first of all, so that every sum may draw its noise as it is made.
    """
    anchor = _anchor(joint, released[0][1])
    key = emit(lambda anchor: ops.draw_key(anchor, mechanism.seed), anchor)
    if not mechanism.divides_by_batch:
        return [(at, emit(_noise(stream, std), node, key)) for stream, (at, node) in enumerate(released)]
    if isinstance(joint.batch, int):
        std = std / max(joint.batch, 1)
        return [(at, emit(_noise(stream, std), node, key)) for stream, (at, node) in enumerate(released)]
    return [
        (at, emit.per_sample(_noise_over_batch(stream, std), node, key)) for stream, (at, node) in enumerate(released)
    ]


def _anchor(joint: JointGraph, gradient: fx.Node) -> fx.Node:
    """A value of the backward pass on the device of a gradient. The sum over no samples is a constant, not one."""
    device = gradient.meta["val"].device
    tangents = [t for t in joint.tangents if t.meta["val"].device == device]
    if not tangents and joint.batch == 0:
        raise Refusal(
            f"an empty batch has nothing to draw noise from: the parameters are on {device}, and no output of the "
            "model is. Let the model return what it computed there, and move it outside"
        )
    return tangents[0] if tangents else gradient


def _noise(stream: int, std: float) -> Callable[..., Tensor]:
    return lambda grad, key: ops.add_noise(grad, key, stream, std)


def _noise_over_batch(stream: int, std: float) -> Callable[..., Tensor]:
    """Noise of deviation std / B for a batch size B that is known only at run time."""

    def noised(batch: torch.SymInt, grad: Tensor, key: Tensor) -> Tensor:
        divisor = torch.sym_max(batch, 1)
        return ops.add_noise(grad * divisor, key, stream, std) / divisor

    return noised
