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

import math
import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, size_expression
from flashdp_compile.errors import FlashDPError, InternalError
from flashdp_compile.passes.axes.domain import Batched, Constant, Reduced, same
from flashdp_compile.passes.axes.engine import Axes, propagate
from flashdp_compile.passes.before import Before, has
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.clipped import NotProved, Reader, Share, is_zero
from flashdp_compile.passes.groups import Group
from flashdp_compile.passes.guarantee import Guarantee
from flashdp_compile.passes.norms import squared_norms
from flashdp_compile.passes.values import Values

aten, prims, flashdp = torch.ops.aten, torch.ops.prims, torch.ops.flashdp


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
        _Proof(joint, guarantee, before, axes).run()
    except NotProved as reason:
        _fail(str(reason))
    return axes


class _Proof:
    """One rewritten graph against one guarantee."""

    def __init__(self, joint: JointGraph, guarantee: Guarantee, before: Before, axes: Axes | None) -> None:
        self.joint, self.guarantee, self.before, self.axes = joint, guarantee, before, axes
        self.results = joint.output.args[0]
        added = [n for n in joint.graph.nodes if n not in before.nodes and n.op != "output"]
        self.clips, self.keys, self.noises, self.scales, self.moved, self.counted, self.probes = (
            [n for n in added if n.target is op.default]
            for op in (
                flashdp.clip_factors,
                flashdp.draw_key,
                flashdp.add_noise,
                flashdp.grad_scale,
                flashdp.bound_scales,
                flashdp.count_within,
                flashdp.draw_probe_key,
            )
        )
        # a key that does not depend on a tangent could be drawn in the forward pass, once for several backward passes
        self.backward = _downstream(joint.graph, joint.tangents)
        random = [*self.clips, *self.keys, *self.noises, *self.scales, *self.moved, *self.counted, *self.probes]
        tainted = _downstream(joint.graph, random)
        self.streams: dict[int, int] = {}
        self.reader = Reader(Values(joint.graph), tainted, single=joint.batch == 1)

    def run(self) -> None:
        self._nothing_else_changed()
        named: dict[str, list[int]] = {}
        for position, gradient in self.before.released.items():
            named.setdefault(gradient.name, []).append(position)
        members = [name for group in self.guarantee.groups for name in dict.fromkeys(group.members)]
        if sorted(members) != sorted(named):
            raise NotProved(f"the groups hold {sorted(members)}, the gradients are those of {sorted(named)}")
        if len(self.scales) != (self.guarantee.grad_scaler is not None and bool(named)):
            raise NotProved(f"the loss is scaled by {self.scales}, which is not what the options say")
        sums = {p: self._unnoised(p) for p in self.before.released}
        if len(self.noises) != len(self.streams):
            raise NotProved("there is noise that belongs to no gradient")
        if self.joint.batch == 0:
            self._all_zero(sums)
            return
        owner: dict[fx.Node, str] = {}
        shares: dict[str, Counter[Share]] = {group.name: Counter() for group in self.guarantee.groups}
        for group in self.guarantee.groups:
            for position in (p for name in dict.fromkeys(group.members) for p in named[name]):
                weights, share = self._share(position, sums[position])
                if owner.setdefault(weights, group.name) != group.name:
                    name = self.before.released[position].name
                    raise NotProved(f"the gradient of {name} is weighted by the weights of group {owner[weights]}")
                shares[group.name][share] += 1
        for position, summed in sums.items():
            self._same_operands(position, summed)
        for group in self.guarantee.groups:
            weights, *more = [w for w, name in owner.items() if name == group.name]
            if more:
                raise NotProved(f"the gradients of group {group.name} have several weights: {weights}, {more}")
            self._clips(group, weights, shares[group.name])
        self._moved_bounds({name: weights for weights, name in owner.items()})
        self._probes()
        if len(owner) != len(self.clips):
            raise NotProved("there are clip weights that belong to no group")
        if self.reader.slack > self.guarantee.slack:
            raise NotProved(f"norms may be off by {self.reader.slack}, the noise allows {self.guarantee.slack}")

    def _nothing_else_changed(self) -> None:
        """The model's nodes, the other outputs, and no op beside them that would write somewhere."""
        known = self.before.nodes
        if len(self.results) != len(self.before.kept) + len(self.before.released):
            raise NotProved("the number of outputs has changed")
        for position, node in self.before.kept.items():
            if self.results[position] is not node:
                raise NotProved(f"output {position} was replaced, which is no gradient of a parameter")
            if self.axes is None or not isinstance(node, fx.Node):
                continue
            a_gradient = any(g.position == position for g in self.joint.gradients)
            if a_gradient and not isinstance(self.axes[node], (Batched, Constant)):
                raise NotProved(f"output {position} ({node}) carries a sum over samples that was not clipped")
        for node in self.joint.graph.nodes:
            if node in known:
                if (node.target, node.args, node.kwargs) != known[node]:
                    raise NotProved(f"{node}, a node of the model, was changed")
            elif node.op != "output" and not _is_pure(node):
                raise NotProved(f"{node} ({node.target}) may do more than return a value")

    def _unnoised(self, position: int) -> fx.Node:
        """The clipped sum behind a release, which must have the right noise."""
        node, gradient = self.results[position], self.before.released[position]
        name, dtype = gradient.name, gradient.node.meta["val"].dtype
        if node.target is prims.convert_element_type.default and node.args[1] == dtype:
            node = node.args[0]
        if node.meta["val"].dtype not in (torch.float32, torch.float64):
            raise NotProved(f"the gradient of {name} was rounded to {node.meta['val'].dtype} before its noise")
        if self.guarantee.grad_scaler is not None:
            node = self._unscaled(node, name)
        if self.guarantee.noise_multiplier == 0:
            return node
        divisor = self.guarantee.divisor(self.joint.batch)
        if divisor is None:
            node = self._scaled(node, aten.div.Tensor, name)
        if node.target is not flashdp.add_noise.default:
            raise NotProved(f"the gradient of {name} leaves the graph without noise (it ends in {node.target})")
        summed, key, stream, deviation = node.args
        if [key] != self.keys or key.args[1] != self.guarantee.seed or key.args[0] not in self.backward:
            raise NotProved(f"the noise of {name} is not drawn from the one key of this release")
        if key.meta["val"].device != summed.meta["val"].device:
            raise NotProved(f"the noise of {name} is drawn on another device than its gradient's")
        # Philox would take it modulo 2^32. Not `in range`, which counts up to 2^32 for anything but an int.
        if not isinstance(stream, int) or not 0 <= stream < 2**32:
            raise NotProved(f"the noise of {name} has the stream {stream}")
        if self.streams.setdefault(stream, position) != position:
            raise NotProved(f"the gradient of {name} would get the noise of another parameter")
        stated = self.guarantee.deviation / (divisor or 1)
        if not math.isclose(deviation, stated, rel_tol=1e-12):
            raise NotProved(f"the noise of {name} has the deviation {deviation}, not {stated}")
        if divisor is None:
            summed = self._scaled(summed, aten.mul.Tensor, name)
        return summed

    def _unscaled(self, node: fx.Node, name: str) -> fx.Node:
        """The release in release * s, for the scale s of the loss, looked up in this very backward."""
        (scale,) = self.scales
        if node.target is not aten.mul.Tensor or node.kwargs or node.args[1] is not scale:
            raise NotProved(f"the gradient of {name} is not scaled as its loss was")
        if scale.args[1] != self.guarantee.grad_scaler or scale.args[0] not in self.backward:
            raise NotProved(f"the gradient of {name} is scaled by another scaler, or by an old scale")
        return node.args[0]

    def _scaled(self, node: fx.Node, target: Any, name: str) -> fx.Node:
        """The value in value / B or value * B, for a B that is max(size of the batch, 1)."""
        if node.target is target and not node.kwargs and len(node.args) == 2:
            value, by = node.args
            size = by.args[0] if isinstance(by, fx.Node) and by.target is torch.sym_max and by.args[1] == 1 else None
            if size is not None and same(size_expression(size.meta["val"]), self.joint.batch):
                return value
        raise NotProved(f"the gradient of {name} is not divided by the size of the batch behind its noise")

    def _share(self, position: int, summed: fx.Node) -> tuple[fx.Node, Share]:
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

    def _same_operands(self, position: int, summed: fx.Node) -> None:
        """A clipped sum is made of what its plain gradient was made of, with something from each point."""
        points, name = self.before.operands[position], self.before.released[position].name
        found, seen, queue = set(), {summed}, [summed]
        while queue:
            node = queue.pop()
            if node in self.before.nodes:
                if self.axes is None or has(self.axes.states.get(node), Batched):
                    found.add(node)
            elif node not in self.clips and not isinstance(node.meta.get("val"), (int, torch.SymInt)):
                further = [n for n in node.all_input_nodes if n not in seen]
                seen.update(further)
                queue.extend(further)
        strange = found - frozenset().union(*points)
        if strange:
            raise NotProved(f"the gradient of {name} is made of {strange}, which its plain gradient is not")
        if not all(point & found for point in points):
            raise NotProved(f"a part of the gradient of {name} is missing: one of {points} is not read")

    def _clips(self, group: Group, weights: fx.Node, shares: Counter[Share]) -> None:
        """Weights from the norms of just these shares, by the stated bound, function and divisor."""
        norms, *policy = weights.args
        stated = [group.bound, self.guarantee.clip_fn, self.guarantee.mean, self.guarantee.expected_batch_size]
        if policy[:4] != stated:  # the next two say which samples are counted, and have no part in the weights
            raise NotProved(f"the weights of group {group.name} have the bound and policy {policy}, not {stated}")
        if self.guarantee.bounds is None and policy[6:] != self.scales:
            raise NotProved(f"the weights of group {group.name} undo the scale {policy[6:]}, not {self.scales}")
        try:
            found = squared_norms(self.reader, norms)
        except NotProved as reason:
            raise NotProved(f"the weights of group {group.name} do not come from its norms: {reason}") from None
        if found != shares:
            raise NotProved(
                f"the weights of group {group.name} come from other norms than those of its gradients: "
                f"missing {dict(shares - found)}, in excess {dict(found - shares)}"
            )

    def _moved_bounds(self, weights: dict[str, fx.Node]) -> None:
        """Each group's own scale, of this very backward, and a count of the norms that its weights are made of."""
        moving, groups = self.guarantee.bounds, self.guarantee.groups
        if [len(self.moved), len(self.counted)] != [int(moving is not None and bool(groups))] * 2:
            raise NotProved(f"bounds are moved by {self.moved + self.counted}, which is not what the options say")
        if moving is None or not groups:
            return
        (moved,), (counted,) = self.moved, self.counted
        if moved.args[1] != moving.place or moved.args[0] not in self.backward:
            raise NotProved("the scales of the bounds are those of another run, or of an earlier backward")
        if sorted(moving.groups) != sorted(weights):
            raise NotProved(f"bounds move for {moving.groups}, not for {tuple(weights)}")
        norms = [weights[name].args[0] for name in moving.groups]
        if counted.args != (moved, norms, self.guarantee.mean, moving.place):
            raise NotProved("samples within bounds are not counted by the norms of which weights are made")
        for number, name in enumerate(moving.groups):
            _, *policy = weights[name].args
            undone = [s.args for s in policy[6:] if isinstance(s, fx.Node) and s.target is aten.select.int]
            if undone not in ([(moved, 0, number)], [(counted, 0, number)]):
                raise NotProved(f"the weights of group {name} undo {policy[6:]}, not how far its bound has moved")

    def _probes(self) -> None:
        """Norms are estimated where the options allow it: from enough probes, drawn anew, no two from the same ones."""
        drawn, guarantee = self.reader.drawn, self.guarantee
        if drawn and guarantee.norm == "exact":
            raise NotProved(f"{drawn[0].by}: norms are estimated, and the options ask for exact ones")
        if len(self.probes) != bool(drawn):
            raise NotProved(f"probes are drawn by {self.probes}, for the norms {[d.by for d in drawn]}")
        for key in self.probes:
            if key.args[1:] != (guarantee.seed, guarantee.held_probes) or key.args[0] not in self.backward:
                raise NotProved("probes are those of another run, or of an earlier release")
        if any([d.key] != self.probes or _device(d.key) != _device(d.by) for d in drawn):
            raise NotProved("norms are estimated from other numbers than the probes of this release")
        if any(type(d.probes) is not int or d.probes < guarantee.probes for d in drawn):
            raise NotProved(f"norms are estimated from fewer than {guarantee.probes} probes")
        streams = [stream for d in drawn for stream in d.streams]
        if not all(type(s) is int and 0 <= s < 2**32 for s in streams) or len(set(streams)) < len(streams):
            raise NotProved(f"norms are estimated from probes that are not their own: {streams}")

    def _all_zero(self, sums: dict[int, fx.Node]) -> None:
        """Without samples the sum is zero, whatever the graph would compute."""
        for position, node in sums.items():
            root, _ = self.reader.values.layout(node)
            if not is_zero(root):
                raise NotProved(f"the gradient of {self.before.released[position].name} is not zero without samples")


def _downstream(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The sources and all that depends on them."""
    found = set(sources)
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _device(node: fx.Node) -> torch.device:
    return node.meta["val"].device


def _is_pure(node: fx.Node) -> bool:
    """An op of torch that writes nowhere, a part of its result, or arithmetic on sizes."""
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return node.target is operator.getitem or isinstance(node.meta.get("val"), (int, torch.SymInt))


def _fail(what: str) -> NoReturn:
    raise InternalError(
        f"the rewritten graph failed its own verification: {what}. Nothing was released. This is a bug in "
        "flashdp_compile; please report it with the folder that options={'debug': True} writes."
    )
