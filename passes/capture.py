"""Joint graph in, its meaning out: which input is data, which output is the gradient of which parameter.

`describe_inputs` (inputs.py) reads the graph that dynamo made, where names and parameters are known. `capture` reads
the joint graph that AOTAutograd made of it, and ties both together by the positions of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from flashdp_compile.compat import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    TangentAOTInput,
    belongs_to_backward,
    size_expression,
)
from flashdp_compile.errors import InputError, Refusal
from flashdp_compile.passes.axes.domain import Size
from flashdp_compile.passes.batch_axis import BatchDim, batch_dim_of, batch_size, check_patterns
from flashdp_compile.passes.inputs import Input


@dataclass(frozen=True)
class Gradient:
    """Output number `position` of the joint graph: the gradient `node` of input number `index`."""

    position: int
    node: fx.Node
    index: int
    name: str


@dataclass(frozen=True)
class JointGraph:
    """A joint graph and the roles of its inputs and outputs.

    `samples` maps the inputs that hold samples to their batch dimension, `tangents` every tangent to the forward
    output it belongs to, `batch` is the size B that all samples share.
    """

    graph: fx.Graph
    inputs: tuple[Input, ...]
    captured_batch: Size
    samples: dict[fx.Node, int]
    parameters: dict[fx.Node, Input]
    tangents: dict[fx.Node, fx.Node]
    gradients: tuple[Gradient, ...]
    outputs: tuple[fx.Node, ...]
    mutated: dict[fx.Node, str]

    @property
    def batch(self) -> Size:
        """A number where torch has made one of the symbol since, as some of its own code does while we trace it."""
        if isinstance(self.captured_batch, int):
            return self.captured_batch
        node, dim = next(iter(self.samples.items()))
        return size_expression(node.meta["val"].shape[dim])

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()


def capture(
    graph: fx.Graph, inputs: tuple[Input, ...], batch_dim: BatchDim, forward_alone: bool = False
) -> JointGraph | None:
    """The meaning of a joint graph; None for a graph without backward, which releases no gradient, unless
    `forward_alone`.

    Raises `Refusal` for a graph whose inputs or outputs cannot be told apart, and `InputError` when the batch size
    cannot.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    output = graph.output_node()
    descriptions = output.meta.get("desc")
    results = list(output.args[0])
    if descriptions is None or len(descriptions) != len(results):
        raise Refusal("flashdp cannot tell the gradients of this graph apart: torch gave its outputs no descriptions.")
    if not any(map(_is_tangent, placeholders)):
        if any(map(belongs_to_backward, [*(n.meta.get("desc") for n in placeholders), *descriptions])):
            raise Refusal(_SUBCLASS)
        if not forward_alone:
            return None

    samples: dict[fx.Node, int] = {}
    parameters: dict[fx.Node, Input] = {}
    described: dict[fx.Node, Input] = {}
    for node in placeholders:
        description = node.meta.get("desc")
        if isinstance(description, TangentAOTInput) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if "Token" in type(description).__name__:
            raise Refusal(
                "flashdp cannot compile a region with ops that have side effects (torch orders them by tokens). Keep "
                "them out of the model's training step. Checks in torch.linalg are such ops, as one matrix that cannot "
                "be factored would stop the whole step: use solve_ex, inv_ex and cholesky_ex, which do not check."
            )
        if not isinstance(description, PlainAOTInput):
            raise Refusal(
                f"flashdp cannot trace input {node.name} of the compiled region ({type(description).__name__}). "
                "Tensor subclasses and inputs that are views of one another are not supported: pass plain tensors."
            )
        described[node] = inputs[description.idx]
        if described[node].role == "unknown":
            raise InputError(_undeclared(described[node]))
        if described[node].role == "sample":
            samples[node] = batch_dim_of(batch_dim, described[node].name)
        elif described[node].role == "parameter":
            parameters[node] = described[node]
    check_patterns(batch_dim, [i.name for i in described.values() if i.role == "sample"])
    batch = batch_size({n: described[n] for n in samples}, samples)

    by_description = {d: n for n, d in zip(results, descriptions, strict=True) if n is not None}
    tangents = {n: by_description[n.meta["desc"].output] for n in placeholders if _is_tangent(n)}
    gradients, outputs, mutated = [], [], {}
    for position, (node, description) in enumerate(zip(results, descriptions, strict=True)):
        if not isinstance(node, fx.Node):
            continue
        if isinstance(description, GradAOTOutput):
            of = description.grad_of
            if not isinstance(of, PlainAOTInput):
                raise Refusal(f"flashdp cannot tell whose gradient output {position} is ({type(of).__name__}).")
            if node.meta["val"].is_complex() and inputs[of.idx].role != "sample":
                raise Refusal(
                    f"parameter '{inputs[of.idx].name}' is complex, and flashdp bounds and noises real gradients only. "
                    "Make its real and imaginary part one real parameter, with torch.view_as_complex where it is used."
                )
            gradients.append(Gradient(position, node, of.idx, inputs[of.idx].name))
        elif belongs_to_backward(description):
            raise Refusal(_SUBCLASS)
        elif isinstance(description, InputMutationAOTOutput):
            changed = description.mutated_input
            mutated[node] = inputs[changed.idx].name if isinstance(changed, PlainAOTInput) else str(changed)
        else:
            outputs.append(node)
    devices = {str(g.node.meta["val"].device) for g in gradients if inputs[g.index].role != "sample"}
    if len(devices) > 1:
        raise Refusal(
            f"the parameters are on several devices ({', '.join(sorted(devices))}), and norms and noise of a release "
            "are made on one: compile the part on each device by itself"
        )
    for node in graph.nodes:  # mutations that torch kept in the graph
        if node.target is torch.ops.aten.copy_.default and node.args[0] in described:
            mutated.setdefault(node.args[1], described[node.args[0]].name)
    return JointGraph(graph, inputs, batch, samples, parameters, tangents, tuple(gradients), tuple(outputs), mutated)


_SUBCLASS = (
    "an output of the compiled region, or a parameter, is a tensor subclass (a nested tensor, for instance), whose "
    "gradients flashdp cannot tell apart. Return plain tensors: compute the loss of each sample inside the compiled "
    "module, or pad the samples to one length."
)


def _is_tangent(node: fx.Node) -> bool:
    return isinstance(node.meta.get("desc"), TangentAOTInput)


def _undeclared(described: Input) -> str:
    return (
        f"flashdp cannot tell what tensor '{described.name}' [{', '.join(described.shape)}] holds: it is neither an "
        "argument of the compiled call nor a parameter or buffer of the model. If it holds samples, pass it as an "
        f"argument. If it holds no private data, declare it: options={{'public_inputs': ['{described.name}']}}, or "
        "register it as a buffer."
    )
