"""The result of every pass as text, and all of them as JSON: what the debug folder, the report and the tests print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from flashdp_compile.compat import size_expression
from flashdp_compile.kernels.catalogue import FAMILIES
from flashdp_compile.kernels.codegen import source
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.batch_axis import BatchDim, batch_dim_of
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.groups import sensitivity
from flashdp_compile.passes.inputs import Input
from flashdp_compile.passes.plan import Choice, Plan
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.price_of_probes import Price
from flashdp_compile.passes.refuse import user_line


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Left-aligned columns, without trailing blanks."""
    lines = [list(map(str, header)), *[list(map(str, r)) for r in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def graph_text(graph: fx.Graph) -> str:
    """The graph as the Python that fx would run, shapes included."""
    return fx.GraphModule(graph.owning_module or torch.nn.Module(), graph).print_readable(print_output=False)


def inputs_table(inputs: Sequence[Input], batch_dim: BatchDim) -> str:
    """The inputs of the region: what each one is taken for."""
    rows = [
        (i.name, i.role, f"[{', '.join(i.shape)}]" if i.role != "size" else "", i.dtype, _batch_axis(i, batch_dim))
        for i in inputs
    ]
    return table(("input", "role", "shape", "dtype", "batch axis"), rows)


def _batch_axis(described: Input, batch_dim: BatchDim) -> str:
    return f"dim {batch_dim_of(batch_dim, described.name)}" if described.role == "sample" else ""


def axes_table(axes: Axes) -> str:
    """Every value of the graph and where its samples are."""
    rows = []
    for node, state in axes.states.items():
        states = state if isinstance(state, tuple) else (state,)
        rows.append((node.name, _sizes(node), " | ".join(map(str, states))))
    return table(("value", "shape", "state"), rows)


def _sizes(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"[{', '.join(str(size_expression(s)) for s in value.shape)}]" if isinstance(value, torch.Tensor) else ""


def points_table(gradients: Sequence[ParameterGradient]) -> str:
    """Every parameter with the places where samples are summed into its gradient."""
    rows = [
        (
            g.name if i == 0 else "",
            g.kind if i == 0 else "",
            f"{p.key} {_op(p.node)}",
            ", ".join(map(str, dict.fromkeys(p.axes))) or "constant",
        )
        for g in gradients
        for i, p in enumerate(g.points)
    ]
    return table(("parameter", "layer", "point", "operand batch axes"), rows)


def _op(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.")


def plan_table(plan: Plan) -> str:
    """The strategy of every gradient, its cost and what the other candidates would take."""
    rows = [
        (
            c.gradient.name,
            group.name,
            f"{group.bound:.4g}",
            c.strategy.name,
            expression(c.cost.flops),
            expression(c.cost.moved),
            ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in c.seconds.items()),
        )
        for group in plan.groups
        for c in plan.choices.get(group.name, ())
    ]
    header = ("parameter", "group", "bound", "strategy", "FLOPs", "bytes moved", "predicted")
    runs = [f"{', '.join(run.names)} share one input" for shared in plan.shared.values() for run in shared]
    note = f"sensitivity {sensitivity(plan.groups):.6g}, slack {plan.slack:.2g}, {len(plan.groups)} group(s)"
    return "\n".join([table(header, rows), "", *runs, note])


def prices_table(prices: Sequence[Price]) -> str:
    """What estimated norms take, by the number of probes."""
    rows = [
        (
            p.probes,
            p.layers,
            f"{p.flops:.3g}",
            f"{p.exact_flops:.3g}",
            f"{1e3 * p.seconds:.3g} ms",
            f"{1e3 * p.exact_seconds:.3g} ms",
            f"{p.noise:.3f} x",
        )
        for p in prices
    ]
    header = ("probes", "layers", "FLOPs", "of exact norms", "predicted", "of exact norms", "noise, at least")
    return table(header, rows)


def expression(value: sympy.Expr) -> str:
    """A number in short form, a formula in its symbols otherwise."""
    simple = sympy.expand(value)
    return f"{float(simple):.3g}" if simple.is_number else str(sympy.factor(simple))


def kernel_sources(graph: fx.Graph) -> dict[str, str]:
    """The Triton source for every kernel that a rewritten graph asks for, by `<node>.py`."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        name = getattr(node.target, "_opname", None)
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "flashdp" and name in FAMILIES:
            family = FAMILIES[name]
            arguments = fx.map_arg(tuple(node.args), lambda n: n.meta["val"])
            found[f"{node.name}.py"] = source(family, family.specialise(*arguments))
    return found


def as_json(
    joint: JointGraph, axes: Axes, gradients: Sequence[ParameterGradient], plan: Plan, batch_dim: BatchDim
) -> dict[str, Any]:
    """All of it for programs. Sizes and costs are strings, since they may hold symbols."""
    return {
        "batch": str(joint.batch),
        "inputs": [{"name": i.name, "role": i.role, "shape": list(i.shape), "dtype": i.dtype} for i in joint.inputs],
        "batch_dim": batch_dim if isinstance(batch_dim, int) else dict(batch_dim),
        "axes": {n.name: [str(s) for s in (v if isinstance(v, tuple) else (v,))] for n, v in axes.states.items()},
        "parameters": [_parameter_json(g) for g in gradients],
        "groups": [{"name": g.name, "bound": g.bound, "members": list(g.members)} for g in plan.groups],
        "sensitivity": sensitivity(plan.groups),
        "slack": plan.slack,
        "shared_inputs": [list(run.names) for shared in plan.shared.values() for run in shared],
        "choices": [_choice_json(c, group.name) for group in plan.groups for c in plan.choices[group.name]],
    }


def _parameter_json(gradient: ParameterGradient) -> Mapping[str, Any]:
    return {
        "name": gradient.name,
        "layer": gradient.kind,
        "shape": [str(size_expression(s)) for s in gradient.shape],
        "points": [
            {"value": str(p.key), "op": _op(p.node), "axes": [str(a) for a in p.axes], "line": user_line(p.node)}
            for p in gradient.points
        ],
    }


def _choice_json(choice: Choice, group: str) -> Mapping[str, Any]:
    return {
        "parameter": choice.gradient.name,
        "group": group,
        "strategy": choice.strategy.name,
        "flops": str(choice.cost.flops),
        "bytes_moved": str(choice.cost.moved),
        "bytes_held": str(choice.cost.held),
        "predicted_seconds": choice.seconds,
    }
