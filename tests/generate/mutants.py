"""A model with one mixer at a random place, and an experiment that tells whether its gradient then mixes samples.

The model is dynamo's graph with its parameters, so that any op inside any layer or loss may be followed by the mixer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from flashdp_compile.passes.inputs import describe_inputs
from generate import mixers


class Rebuilt(nn.Module):
    """A graph of dynamo as a module of its own, called with the inputs that hold samples."""

    def __init__(self, gm: fx.GraphModule, values: list[Tensor], roles: list[str]) -> None:
        super().__init__()
        self.gm, self.roles = gm, roles
        for place, (value, role) in enumerate(zip(values, roles, strict=True)):
            if role == "parameter":
                self.register_parameter(f"p{place}", nn.Parameter(value.detach().clone(), value.requires_grad))
            elif role != "sample":
                self.register_buffer(f"b{place}", value.detach().clone())

    def inputs(self, *samples: Tensor) -> list[Tensor]:
        rest = iter(samples)
        return [
            next(rest) if role == "sample" else getattr(self, ("p" if role == "parameter" else "b") + str(place))
            for place, role in enumerate(self.roles)
        ]

    def forward(self, *samples: Tensor) -> Any:
        return self.gm(*self.inputs(*samples))


def rebuild(model: nn.Module, args: tuple, kwargs: dict | None = None, public: tuple[str, ...] = ()):
    """The module, and the samples it is called with; None where dynamo's graph has inputs that are no tensors."""
    found: list = []

    def backend(gm: fx.GraphModule, values: list[Any]) -> Any:
        found.append((gm, list(values), [i.role for i in describe_inputs(gm.graph, public)]))
        return gm.forward

    torch.compiler.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*args, **(kwargs or {}))
    gm, values, roles = found[0]
    if not all(isinstance(v, Tensor) for v in values) or any(
        "rand" in str(n.target) or "dropout" in str(n.target) for n in gm.graph.nodes
    ):
        return None
    for node in gm.graph.nodes:
        node.meta.pop("example_value", None)
    samples = [v.detach() for v, role in zip(values, roles, strict=True) if role == "sample"]
    return Rebuilt(gm, values, roles), samples


class _Recorder(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        name = "output" if node.op == "output" else f"%{node.name}"  # a value may be called output as well
        if isinstance(result, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(result):
            return result  # inside a vmap, and nothing outside of it
        self.seen[name] = result.clone() if isinstance(result, Tensor) else result
        return result


def record(module: Rebuilt, samples: list[Tensor]) -> dict[str, Any]:
    recorder = _Recorder(module.gm)
    recorder.seen = {}
    with torch.no_grad():
        recorder.run(*[v.clone() for v in module.inputs(*samples)])
    return recorder.seen


@dataclass
class Data:
    """Two batches of samples; `weights` [B, n] belong to the samples as well, for the loss outside."""

    pairs: list[tuple[Tensor, Tensor]]
    dim: int
    weights: tuple[Tensor, Tensor]
    size: int

    def pick(self, *changed: int, order: list[int] | None = None) -> tuple[list[Tensor], Tensor]:
        """The first batch with some samples of the second, and its samples in some order."""
        result = []
        for a, b, dim in [*((a, b, self.dim) for a, b in self.pairs), (*self.weights, 0)]:
            a = a.clone()
            for j in changed:
                a.select(dim, j).copy_(b.select(dim, j))
            result.append(a if order is None else a.index_select(dim, torch.tensor(order)))
        return result[:-1], result[-1]


def owners(before: Tensor, after: list[Tensor]) -> Tensor:
    """For every element the sample that moves it: -1 for none, -2 for several. `after` [j]: sample j was replaced."""
    moved = torch.stack([~torch.isclose(_exact(before), _exact(a), rtol=0, atol=0, equal_nan=True) for a in after])
    count = moved.sum(0)
    return torch.where(count == 1, moved.int().argmax(0), torch.where(count == 0, -1, -2))


def _exact(values: Tensor) -> Tensor:
    return values if values.is_complex() else values.double()


def axis_of(owner: Tensor, size: int) -> tuple[int, Tensor] | None:
    """The dimension along which the owners change, each having as many places as the others, and the owner of each."""
    if not owner.numel():
        return None
    for d in range(owner.dim()):
        n = owner.shape[d]
        if n % size:
            continue
        along = owner.movedim(d, 0).reshape(n, -1)
        of_place = along.amax(1)
        if bool(((along == of_place[:, None]) | (along == -1)).all()) and bool((of_place >= 0).all()):
            if of_place.bincount(minlength=size).eq(n // size).all():
                return d, of_place
    return None


def reaching(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on."""
    found, waiting = set(), [graph.output_node()]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


class Subject:
    """A model that keeps samples apart, ready to be mutated and tried."""

    def __init__(self, module: Rebuilt, data: Data) -> None:
        self.module, self.data = module, data
        base, moved = self.runs(module)
        axes = {
            name: axis_of(owners(value, [m[name] for m in moved]), data.size)
            for name, value in base.items()
            if isinstance(value, Tensor) and value.dim()
        }
        used = {f"%{n.name}" for n in reaching(module.gm.graph)}
        self.places = {
            name: (axes[name][0], base[name].is_floating_point()) for name in axes if axes[name] and name in used
        }
        self.outputs = self.axes_of_outputs(module)

    def runs(self, module: Rebuilt) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """All values for the first batch, and for the same with each of the samples replaced."""
        return record(module, self.data.pick()[0]), [
            record(module, self.data.pick(j)[0]) for j in range(self.data.size)
        ]

    def axes_of_outputs(self, module: Rebuilt) -> list[tuple[int, Tensor] | None]:
        base, moved = self.runs(module)
        return [
            axis_of(owners(out, [m["output"][k] for m in moved]), self.data.size) if out.dim() else None
            for k, out in enumerate(base["output"])
        ]

    def gradient(self, module: Rebuilt, axes: list, *changed: int, order: list[int] | None = None) -> Tensor:
        """The gradient of a loss that is a sum over samples of functions of what a sample owns of the outputs."""
        samples, weights = self.data.pick(*changed, order=order)
        outputs, loss = module(*samples), torch.zeros((), dtype=torch.float64)
        own = weights.new_zeros(self.data.size)
        for axis, out in zip(axes, outputs, strict=True):
            if not out.is_floating_point():
                continue
            if axis is None:
                loss = loss + out.sum()
                continue
            rows = (out + out.sin()).movedim(axis[0], 0)
            for b in range(self.data.size):
                flat = rows[axis[1] == b].flatten()
                weight = weights[b].repeat(1 + len(flat) // 64)[: len(flat)]
                own = own + F.one_hot(torch.tensor(b), self.data.size) * (flat * weight).sum()
        loss = loss + (own + own.sin()).sum()
        parameters = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
        )

    def mixes(self, module: Rebuilt) -> str:
        """How the gradient is no sum of a term for each sample, the same at every place; empty if it is one."""
        size = self.data.size
        # where a mutant keeps its samples, in another dimension maybe, its loss outside may be told
        axes = [own or before for own, before in zip(self.axes_of_outputs(module), self.outputs, strict=True)]
        base = self.gradient(module, axes)
        if not base.isfinite().all():
            return ""
        scale = 1e-7 * float(base.norm()) + 1e-12
        one = [self.gradient(module, axes, j) for j in range(size)]
        for i in range(size):
            for j in range(i):
                if float((self.gradient(module, axes, i, j) - one[i] - one[j] + base).norm()) > scale:
                    return "samples"
        moved = self.gradient(module, axes, order=[*range(1, size), 0])
        return "places" if float((moved - base).norm()) > scale else ""

    def mutant(self, rng: random.Random, name: str = "", mixer: str = "", wrap: str = "") -> tuple[Rebuilt, str] | None:
        """The model with a mixer behind a node, each drawn unless it is given, and words on which and where."""
        if not self.places:
            return None
        name = name or rng.choice(sorted(self.places))
        d, floating = self.places[name]
        mixer = mixer or rng.choice(sorted(mixers.FLOATS if floating else mixers.OTHERS))
        wrap = wrap or rng.choice(sorted(mixers.WRAPS))
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.module.gm.graph, copies))
        node = next(copies[n] for n in self.module.gm.graph.nodes if f"%{n.name}" == name)
        after = node
        while node.op == "placeholder" and after.next.op == "placeholder":
            after = after.next
        with graph.inserting_after(after):
            mixed = graph.call_function(mixers.apply, (node, mixer, wrap, d))
        node.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)
        module = self.module
        gm = fx.GraphModule(module.gm, graph)
        values = [v.detach().clone().requires_grad_(v.requires_grad) for v in module.inputs(*self.data.pick()[0])]
        return Rebuilt(gm, values, module.roles), f"{mixer}, {wrap if floating else 'ids'}, after {name}, dim {d}"
