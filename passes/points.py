"""Reduction points: where samples are summed into gradients, and the linear map from those sums to each gradient.

Every gradient of an accepted graph is a linear, batch-free function of sums over the samples. This pass names those
sums, recognises which layer's backward they are, and flattens each gradient into terms where it is nothing but a sum
of relabelled points; the strategies of the plan build on that. A gradient of any other form keeps its subgraph.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import size_expression
from flashdp_compile.passes.axes.domain import Batched, Constant, Mixed, PointKey, Reduced
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.capture import Gradient, JointGraph
from flashdp_compile.passes.nodes import RESHAPES
from flashdp_compile.passes.order import dependents
from flashdp_compile.passes.refuse import refuse
from flashdp_compile.passes.values import laid_out

aten, prims = torch.ops.aten, torch.ops.prims

# ops whose result for one sample is the op itself on that sample's slice, or is entered in materialize's `_SPECIAL`
_POINT_OPS = {
    "mm": "linear",
    "bmm": "batched linear",
    "sum": "sum",
    "index_put": "embedding",
    "_unsafe_index_put": "embedding",
    "_unsafe_masked_index_put_accumulate": "embedding",
    "_trilinear": "bilinear",
    "embedding_dense_backward": "embedding",
    "_embedding_bag_backward": "embedding bag",
    "convolution_backward": "convolution",
}


@dataclass(frozen=True)
class Point:
    """One reduction point. `kind` names the layer whose backward it is; `axes` the batch axis of each operand."""

    key: PointKey
    kind: str
    axes: tuple[Batched, ...]

    @property
    def node(self) -> fx.Node:
        return self.key.node


@dataclass(frozen=True)
class Term:
    """A point and the relabelling (permutation, reshape) under which it enters a gradient."""

    point: Point
    relabelling: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ParameterGradient:
    """The gradient of one parameter. `terms` is None where it is more than a sum of relabelled points."""

    gradient: Gradient
    kind: str
    points: tuple[Point, ...]
    terms: tuple[Term, ...] | None

    @property
    def name(self) -> str:
        return self.gradient.name

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.gradient.node.meta["val"].shape)


def find_points(axes: Axes) -> tuple[ParameterGradient, ...]:
    """The gradient of every parameter as points and terms, in the order of the outputs.

    Raises `Refusal` for a gradient that is no sum over samples. The gradient of an input that holds samples passes:
    it stays per sample, and what it reaches outside of the region is not flashdp's to release.
    """
    found = []
    for gradient in axes.joint.gradients:
        state = axes[gradient.node]
        of_samples = axes.joint.inputs[gradient.index].role == "sample"
        if of_samples and isinstance(state, (Batched, Constant)):
            continue
        if not isinstance(state, Reduced):
            _refuse_gradient(axes, gradient, state)
        keys = state.points
        points = tuple(_point(axes, key, gradient) for key in keys)
        terms = _terms(axes, gradient.node, ())
        found.append(ParameterGradient(gradient, _kind(axes, points, terms, gradient), points, terms))
    _check_mutations(axes)
    return tuple(found)


def _refuse_gradient(axes: Axes, gradient: Gradient, state: Any) -> None:
    if isinstance(state, Batched):
        reason = f"the gradient of {gradient.name} has one part per sample ({state}), so position b belongs to sample b"
        fix = "a parameter must be shared by all samples; do not lay parameters out along the batch"
    elif isinstance(state, Mixed):
        reason = f"the gradient of {gradient.name} is not a sum over samples: {state.why}"
        fix = (
            "leave terms that do not depend on samples, such as weight decay, to the optimizer "
            "(torch.optim.AdamW(weight_decay=...)), and let the loss be a sum or mean of per-sample losses"
        )
    else:
        reason = f"the gradient of {gradient.name} does not depend on any sample"
        fix = "leave terms that do not depend on samples, such as weight decay, to the optimizer"
    output = _output_without_samples(axes, gradient)
    if output is not None and not isinstance(state, Batched):
        reason = (
            f"the output {output.name} of the compiled region holds no sample and requires a gradient of "
            f"{gradient.name}, which nobody could clip by sample"
        )
        fix = (
            "return it detached, or not at all, and leave a penalty such as weight decay to the optimizer "
            "(torch.optim.AdamW(weight_decay=...)). What forward() keeps on the module (self.x = ...) is an output, "
            "too: use torch.nn.utils.parametrizations.weight_norm in the place of torch.nn.utils.weight_norm"
        )
    refuse(gradient.node, axes.joint, reason, fix)


def _output_without_samples(axes: Axes, gradient: Gradient) -> fx.Node | None:
    """An output whose tangent reaches a gradient and that no sample is in. Losses are: they are sums over samples."""
    tangents = axes.joint.tangents
    without = [tangent for tangent, output in tangents.items() if isinstance(axes[output], Constant)]
    return next((tangents[t] for t in without if gradient.node in {t, *dependents([t])}), None)


def _check_mutations(axes: Axes) -> None:
    """Buffers that remember samples would carry them into later steps, past every clipping."""
    for node, name in axes.joint.mutated.items():
        state = axes[node]
        if not isinstance(state, Constant):
            refuse(
                node,
                axes.joint,
                f"{name} is updated from the samples of this batch ({state})",
                _mutation_fix(axes.joint, name),
            )


def check_single(joint: JointGraph) -> None:
    """For a batch of one sample, where nothing else is proved: no buffer may remember the sample."""
    touched = set(joint.samples) | set(joint.tangents)
    for node in joint.graph.nodes:
        if any(n in touched for n in node.all_input_nodes):
            touched.add(node)
    for node, name in joint.mutated.items():
        if node in touched:
            refuse(node, joint, f"{name} is updated from the samples of this batch", _mutation_fix(joint, name))


def _mutation_fix(joint: JointGraph, name: str) -> str:
    samples = any(i.name == name and i.role == "sample" for i in joint.inputs)
    return "do not write into an input: work on a copy, x = x.clone()" if samples else _RUNNING_FIX


_RUNNING_FIX = "running statistics cannot be kept privately: use GroupNorm or LayerNorm, or BatchNorm in eval mode"


def _point(axes: Axes, key: PointKey, gradient: Gradient) -> Point:
    node = key.node
    own = getattr(node.target, "namespace", "") in ("aten", "prims")  # the names are torch's
    kind = _POINT_OPS.get(node.target._opname) if own else None
    if kind is None:
        refuse(
            node,
            axes.joint,
            f"flashdp does not know the per-sample form of {node.target}, which sums samples into {gradient.name}",
            "add it to the reduction points (docs/passes.md)",
        )
    if kind == "convolution" and key.output == 2:
        kind = "bias"
    states = (axes[n] for n in node.all_input_nodes)
    return Point(key, kind, tuple(s for s in states if isinstance(s, Batched)))


_SAME_VALUE = (prims.convert_element_type.default, aten.clone.default, aten.alias.default, aten._to_copy.default)


def _terms(axes: Axes, node: fx.Node, relabelling: tuple[Any, ...]) -> tuple[Term, ...] | None:
    """Flattens sums of relabelled points; `relabelling` is what happens to `node` on the way to the gradient."""
    state = axes[node]
    key = PointKey(node)
    if node.target is operator.getitem:
        key = PointKey(node.args[0], node.args[1])
    if isinstance(state, Reduced) and state.points == (key,):
        # verify sees through views and permutations, but not through what cuts across them
        if laid_out([size_expression(s) for s in node.meta["val"].shape], relabelling) is None:
            return None
        return (Term(_point(axes, key, _NO_GRADIENT), relabelling),)
    if node.target in _SAME_VALUE:
        return _terms(axes, node.args[0], relabelling)
    if node.target in RESHAPES:
        shape = tuple(node.meta["val"].shape)
        if shape == tuple(node.args[0].meta["val"].shape):
            return _terms(axes, node.args[0], relabelling)
        if any(isinstance(s, torch.SymInt) for s in shape):
            return None
        return _terms(axes, node.args[0], (("view", shape), *relabelling))
    if node.target is aten.permute.default:
        return _terms(axes, node.args[0], _permuted(tuple(node.args[1]), relabelling))
    if node.target is aten.t.default:
        return _terms(axes, node.args[0], _permuted((1, 0), relabelling))
    if node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
        left, right = (_terms(axes, n, relabelling) for n in node.args)
        return None if left is None or right is None else left + right
    return None


_NO_GRADIENT = Gradient(-1, None, -1, "a gradient")  # type: ignore[arg-type]


def _permuted(dims: tuple[int, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """Puts a permutation in front of a relabelling, composing neighbours and dropping the identity."""
    dims = tuple(d % len(dims) for d in dims)
    if rest and rest[0][0] == "permute":
        dims, rest = tuple(dims[d] for d in rest[0][1]), rest[1:]
    return rest if dims == tuple(range(len(dims))) else (("permute", dims), *rest)


def contracted_axes(product: fx.Node, axes: Axes) -> tuple[Batched, Batched]:
    """The batch axes of both operands of a matrix product that sums over samples.

    One side may be the same for all samples (a first hidden state, say): it is read along the other side's axis.
    """
    left, right = (axes.seen_by(product, n) for n in product.args[:2])
    return left, right


def _kind(axes: Axes, points: tuple[Point, ...], terms: tuple[Term, ...] | None, gradient: Gradient) -> str:
    """The layer that a gradient belongs to, in the words of its user."""
    kinds = {p.kind for p in points}
    if terms is None:
        return "table" if kinds == {"sum"} and len(gradient.node.meta["val"].shape) > 1 else "/".join(sorted(kinds))
    if kinds == {"embedding", "linear"}:
        return "tied embedding"
    if kinds == {"sum"}:
        return _kind_of_sum(points[0], gradient)
    return "/".join(sorted(kinds))


def _kind_of_sum(point: Point, gradient: Gradient) -> str:
    if sum(s != 1 for s in gradient.node.meta["val"].shape) > 1:
        return "table"
    operand, alone = point.node.args[0], True
    while isinstance(operand, fx.Node) and operand.target in (*_SAME_VALUE, *RESHAPES):
        alone &= len(operand.users) == 1
        operand = operand.args[0]
    # a product that is formed for this sum alone: the gradient of a factor. A bias sums what others use as well
    if alone and operand.target is aten.mul.Tensor and len(operand.users) == 1:
        return "norm scale" if _near(operand, aten.rsqrt.default, 6) else "scale"
    return "bias"


def _near(node: fx.Node, target: Any, depth: int) -> bool:
    if node.target is target:
        return True
    return depth > 0 and any(_near(n, target, depth - 1) for n in node.all_input_nodes)
