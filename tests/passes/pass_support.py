"""What several tests of passes need: all passes on a model up to one of them, and runs of rewritten graphs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import flashdp_compile.pipeline  # noqa: F401  registers the ops that a rewrite inserts
from flashdp_compile.passes.axes.engine import Axes, propagate
from flashdp_compile.passes.before import Before
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.dump import table
from flashdp_compile.passes.groups import form_groups
from flashdp_compile.passes.guarantee import Guarantee
from flashdp_compile.passes.mechanism import Mechanism
from flashdp_compile.passes.plan import Plan, make_plan
from flashdp_compile.passes.points import ParameterGradient, find_points
from flashdp_compile.passes.rewrite import rewrite
from flashdp_compile.passes.verify import verify
from flashdp_compile.testing import joint_graph

SILENT = Mechanism(noise_multiplier=0.0, clip_fn="hard", mean=False, expected_batch_size=None, seed=0)
NO_BOUND = 1e30


def random_inputs(graph: fx.Graph, seed: int = 0) -> list[object]:
    """Random values for the placeholders of a graph with fixed sizes; integers are 0 or 1."""
    g = torch.Generator().manual_seed(seed)

    def draw(like: object) -> object:
        if not isinstance(like, Tensor):
            return int(like)
        if like.is_floating_point():
            strided = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
            return strided.copy_(torch.randn(like.shape, generator=g, dtype=like.dtype))
        return torch.randint(0, 2, like.shape, generator=g).to(like.dtype)

    return [draw(n.meta["val"]) for n in graph.nodes if n.op == "placeholder"]


def run(graph: fx.Graph, inputs: list[object]) -> list[object]:
    """The outputs of a joint graph, forward outputs first."""
    module = fx.GraphModule(graph.owning_module or nn.Module(), graph)
    with torch.no_grad():
        return list(fx.Interpreter(module).run(*inputs, enable_io_processing=False))


def released_by(
    axes: Axes,
    gradients: tuple[ParameterGradient, ...],
    strategy: str,
    bound: float = NO_BOUND,
    clipping: str = "flat",
    mechanism: Mechanism = SILENT,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by parameter, before and after the rewrite (and its verification) by one strategy."""
    graph = axes.joint.graph
    inputs = random_inputs(graph)
    before = run(graph, inputs)
    plan = make_plan(gradients, axes, clipping, bound, strategy)
    untouched = Before.of(axes.joint, axes)
    rewrite(axes, plan, mechanism)
    verify(axes.joint, guarantee(untouched, clipping, bound, mechanism, plan.slack), untouched)
    after = run(graph, inputs)
    places = {g.name: g.gradient.position for g in gradients}
    return {n: before[i] for n, i in places.items()}, {n: after[i] for n, i in places.items()}


def chosen(plan: Plan) -> dict[str, str]:
    """{parameter: strategy}."""
    return {c.gradient.name: c.strategy.name for choices in plan.choices.values() for c in choices}


def columns(text: str, *names: str) -> str:
    """Some columns of a printed table, by their headers."""
    lines = text.splitlines()
    starts = {m.group(): m.start() for m in re.finditer(r"\S+(?: \S+)*", lines[0])}
    edges = sorted(starts.values()) + [None]
    cells = [[line[starts[n] : edges[edges.index(starts[n]) + 1]].strip() for n in names] for line in lines]
    return table(cells[0], cells[1:])


def guarantee(
    before: Before,
    clipping: object,
    bound: object,
    mechanism: Mechanism,
    slack: float,
    norm: str = "exact",
    probes: int = 0,
) -> Guarantee:
    """What verify() is to find behind these settings."""
    groups = form_groups([g.name for g in before.released.values()], clipping, bound)
    return Guarantee(groups, mechanism, slack, norm, probes)


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph and what verify() compares it with."""

    joint: JointGraph
    plan: Plan
    before: Before
    gradients: tuple[ParameterGradient, ...]
    guarantee: Guarantee

    def result(self, name: str) -> fx.Node:
        """The node that leaves the graph as the gradient of a parameter."""
        return self.joint.output.args[0][self.position(name)]

    def position(self, name: str) -> int:
        return next(g.gradient.position for g in self.gradients if g.name == name)

    def put(self, position: int, node: fx.Node) -> None:
        """Lets another node leave the graph at a position."""
        results = list(self.joint.output.args[0])
        results[position] = node
        self.joint.output.args = (tuple(results),)

    def verify(self) -> Axes | None:
        return verify(self.joint, self.guarantee, self.before)


def rewritten(
    model: nn.Module,
    *args: Tensor,
    strategy: str = "auto",
    clipping: str = "flat",
    bound: float = 1.0,
    mechanism: Mechanism = SILENT,
    norm: str = "exact",
    probes: int = 0,
    **options: object,
) -> Rewritten:
    """All passes but the last on a model."""
    axes = propagate(joint_graph(model, *args, **options))
    gradients = find_points(axes)
    plan = make_plan(gradients, axes, clipping, bound, strategy, None, norm, probes)
    before = Before.of(axes.joint, axes)
    rewrite(axes, plan, mechanism)
    promised = guarantee(before, clipping, bound, mechanism, plan.slack, norm, probes)
    return Rewritten(axes.joint, plan, before, gradients, promised)
