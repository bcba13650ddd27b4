"""Joint graph in, its meaning out: which input is data, which output is the gradient of which parameter.

`describe_inputs` reads the graph that dynamo made, where names and parameters are known. `capture` reads the joint
graph that AOTAutograd made of it, and ties both together by the positions of the inputs.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from flashdp_compile.compat import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    TangentAOTInput,
    belongs_to_backward,
    is_argument,
    is_python_float,
    known_size,
    settle_equal,
    settle_size,
    size_expression,
    source_name,
)
from flashdp_compile.errors import InputError, Refusal
from flashdp_compile.passes.axes.domain import Size, same

Role = Literal["parameter", "buffer", "public", "sample", "size", "unknown"]


BatchDim = int | Mapping[str, int]
"""The dimension along which the samples lie: of all inputs, or {glob over input names: dimension}, the first match
counts, and 0 is that of all others."""


def batch_dim_of(batch_dim: BatchDim, name: str) -> int:
    """The dimension of one input along which the samples lie."""
    if isinstance(batch_dim, int):
        return batch_dim
    return next((dim for pattern, dim in batch_dim.items() if fnmatch.fnmatchcase(name, pattern)), 0)


@dataclass(frozen=True)
class Input:
    """One input of the compiled region, by the name that its user knows it by."""

    name: str
    role: Role
    shape: tuple[str, ...] = ()
    dtype: str = ""


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


_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.?([A-Za-z_]\w*)")


def friendly_name(source: str, with_root: bool = False) -> str:
    """`L['self']._modules['fc']._parameters['weight']` -> `fc.weight`, `L['x']` -> `x`, `L['b']['ids']` -> `b.ids`.

    `with_root` keeps the variable that holds the module: `L['encoder']._parameters['weight']` -> `encoder.weight`.
    """
    parts = [next(g for g in m.groups() if g is not None) for m in _PART.finditer(source)]
    if len(parts) > 2 and parts[1] == "kwargs":
        parts = parts[:1] + parts[2:]  # dynamo's frame packs keyword arguments; their user calls them by name
    rooted_in_module = "._modules[" in source or "._parameters[" in source or "._buffers[" in source
    parts = parts[1:] if parts and parts[0] in ("L", "G") else parts
    parts = parts[1:] if rooted_in_module and len(parts) > 1 and not with_root else parts
    return ".".join(p for p in parts if p not in ("_modules", "_parameters", "_buffers")) or source


def describe_inputs(graph: fx.Graph, public_inputs: Sequence[str]) -> tuple[Input, ...]:
    """The inputs of dynamo's graph in order.

    A tensor is a parameter, a buffer, declared public, or, as an argument of the compiled call, samples. Any other (an
    attribute of a module, a global, a variable of an enclosing function) could hold anything, earlier samples too: its
    role is unknown, and `capture` asks for it to be declared.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = _names([source_name(n) or n.name for n in placeholders])
    return tuple(_describe(n, name, public_inputs) for n, name in zip(placeholders, names, strict=True))


def _names(sources: Sequence[str]) -> list[str]:
    """A name for each source, no two the same. A function of several modules (`lambda x: head(encoder(x))`) has several
    parameters called `weight`: then the variables that hold the modules are part of the names."""
    names = [friendly_name(s) for s in sources]
    of_several = {_root(s) for s, n in zip(sources, names, strict=True) if names.count(n) > 1}
    names = [friendly_name(s, _root(s) in of_several) for s in sources]
    return [s if names.count(n) > 1 else n for s, n in zip(sources, names, strict=True)]


def _root(source: str) -> str:
    return re.split(r"\._(?:modules|parameters|buffers)\[", source, maxsplit=1)[0]


def _describe(node: fx.Node, name: str, public_inputs: Sequence[str]) -> Input:
    value = node.meta.get("example_value")
    source = source_name(node)
    if not isinstance(value, torch.Tensor):
        return Input(name, "size")
    role: Role = "sample" if is_argument(node) else "unknown"
    if isinstance(value, torch.nn.Parameter):
        role = "parameter"
    elif source and re.search(r"\._buffers\['[^']+'\]$", source):
        role = "buffer"
    elif is_python_float(node) or any(fnmatch.fnmatchcase(name, p) for p in public_inputs):
        role = "public"
    shape = tuple(str(size_expression(s)) for s in value.shape)
    return Input(name, role, shape, str(value.dtype).removeprefix("torch."))


def capture(graph: fx.Graph, inputs: tuple[Input, ...], batch_dim: BatchDim) -> JointGraph | None:
    """The meaning of a joint graph; None for a graph without backward, which releases no gradient.

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
    _check_patterns(batch_dim, [i.name for i in described.values() if i.role == "sample"])
    batch = _batch_size({n: described[n] for n in samples}, samples)

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


def _check_patterns(batch_dim: BatchDim, names: Sequence[str]) -> None:
    """A misspelt name must not leave an input with dimension 0: each step in time would then count as a sample."""
    for pattern in batch_dim if isinstance(batch_dim, Mapping) else ():
        if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"batch_dim names {pattern!r}, and no input that holds samples is called that: they are "
                f"{', '.join(names) or 'none'}"
            )


def _batch_size(samples: dict[fx.Node, Input], dims: Mapping[fx.Node, int]) -> Size:
    sizes: dict[fx.Node, Any] = {}
    for node, described in samples.items():
        value = node.meta["val"]
        if not -value.dim() <= dims[node] < value.dim():
            raise InputError(_undecided(described, f"has no dimension {dims[node]}", dims[node]))
        sizes[node] = _settled(value.shape[dims[node]])
    settled = {n for n in sizes.values() if isinstance(n, int) and n < 2}
    if len(settled) == 1:  # torch has fixed the size of some inputs only: the others' follow, if they have it now
        (number,) = settled
        for node in sizes:
            if settle_size(node.meta["val"].shape[dims[node]], number):
                sizes[node] = number
    if not sizes:
        raise InputError(
            "flashdp found no input that holds samples: the compiled region takes no tensor besides parameters and "
            "buffers. Pass the batch as an argument of the compiled module."
        )
    (first, batch), *rest = sizes.items()
    for node, size in rest:
        # dynamo names the sizes of two inputs apart until an op has joined them
        if not same(size, batch) and not settle_equal(*(n.meta["val"].shape[dims[n]] for n in (node, first))):
            fewest = node if node.meta["val"].dim() <= first.meta["val"].dim() else first
            raise InputError(
                _undecided(
                    samples[fewest],
                    f"and another input disagree on the batch size: {samples[first].name} has {batch} samples, "
                    f"{samples[node].name} has {size},",
                    dims[fewest],
                )
            )
    return _settled(first.meta["val"].shape[dims[first]])


def _settled(size: Any) -> Size:
    """None and one are cases of their own, even where a symbol still stands for them."""
    return next((n for n in (0, 1) if known_size(size, n)), size_expression(size))


def _undeclared(described: Input) -> str:
    return (
        f"flashdp cannot tell what tensor '{described.name}' [{', '.join(described.shape)}] holds: it is neither an "
        "argument of the compiled call nor a parameter or buffer of the model. If it holds samples, pass it as an "
        f"argument. If it holds no private data, declare it: options={{'public_inputs': ['{described.name}']}}, or "
        "register it as a buffer."
    )


def _undecided(described: Input, problem: str, batch_dim: int) -> str:
    return (
        f"flashdp cannot tell the batch axis of input '{described.name}' [{', '.join(described.shape)}]: it {problem} "
        f"where batch_dim={batch_dim}. If it is the same for all samples and holds no private data (a table, a mask "
        f"over positions), declare it: options={{'public_inputs': ['{described.name}']}}. If the batch is another "
        f"dimension, set options={{'batch_dim': ...}}, or for this input alone {{'batch_dim': {{'{described.name}': "
        "...}}."
    )
