"""An oracle for the axes pass: runs the joint graph on numbers and looks at which slices of every value move.

It knows nothing about the rules. A claim is wrong if a run of the graph contradicts it:

    Constant    the value stays when a sample is replaced, or when samples trade places; `zero`: all of it is zero
    Batched     only the indices (o, j, i) of its dimension move when sample j is replaced, and samples that trade
                places take their indices along
    Reduced     the value stays when samples trade places, what replacing sample j changes does not depend on the other
                samples, and the value is linear in the sums at the points: f(p + q) = f(p) + f(q) when these are
                overwritten
    Mixed       claims nothing
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from flashdp_compile.passes.axes.domain import Batched, Constant, Reduced
from flashdp_compile.passes.axes.engine import Axes


class Unsound(AssertionError):
    """A run of the graph contradicts a claim."""


class _Run(fx.Interpreter):
    """Interprets a graph and keeps every value; `overwrite` replaces the results of some nodes."""

    def __init__(self, module: fx.GraphModule, overwrite: dict | None = None) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, object] = {}
        self.overwrite = overwrite or {}

    def run_node(self, node: fx.Node) -> object:
        result = self.overwrite[node.name] if node.name in self.overwrite else super().run_node(node)
        self.values[node.name] = result
        return result


class Oracle:
    """Judges the axes of one joint graph whose sizes are all numbers."""

    def __init__(self, axes: Axes, known: dict[str, Tensor] | None = None, seed: int = 0) -> None:
        """`known`: the values of inputs that must not be drawn at random (a mask, an index), by name."""
        self.axes, self.batch, self.known = axes, axes.joint.batch, known or {}
        graph = axes.joint.graph
        self.module = fx.GraphModule(graph.owning_module or torch.nn.Module(), graph)
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.generator = torch.Generator().manual_seed(seed)
        self.states = {n.name: s for n, s in axes.states.items()}

    def check(self) -> None:
        """Raises `Unsound`, naming the value and its claim."""
        first, second = self._inputs(), self._inputs()
        second = [b if isinstance(self.axes[n], Batched) else a for n, a, b in self._each(first, second)]
        values = self._run(first)
        for j in range(self.batch):
            replacement = self._inputs()
            moved = self._run(self._joined(first, replacement, j))
            others = self._run(self._joined(second, first, j))
            others_moved = self._run(self._joined(second, replacement, j))
            for name, state in self.states.items():
                self._check(name, state, j, values[name], moved[name], others[name], others_moved[name])
        self._check_places(first, values)
        self._check_linear(first, values)

    def _check_places(self, inputs: list, values: dict) -> None:
        """The last sample moves to the front: whoever stands elsewhere must be treated as before."""
        order = [self.batch - 1, *range(self.batch - 1)]
        moved = self._run([self._reordered(v, self.axes[n], order) for n, v in self._each(inputs)])
        for name, state in self.states.items():
            states, before, after = (
                v if isinstance(state, tuple) else (v,) for v in (state, values[name], moved[name])
            )
            for s, old, new in zip(states, before, after, strict=True):
                if isinstance(old, Tensor) and isinstance(s, (Batched, Reduced, Constant)):
                    claim = f"{name} {list(old.shape)} is claimed to be '{s}', but depends on the places of the samples"
                    _equal(self._reordered(old, s, order), new, claim)

    def _reordered(self, value: object, state: object, order: list[int]) -> object:
        if not isinstance(state, Batched):
            return value
        moved = _slices(value, state, self.batch).index_select(state.dim + 1, torch.tensor(order))
        return value.clone().copy_(moved.flatten(state.dim, state.dim + 2))  # strides as they were

    def _each(self, *inputs: list) -> zip:
        return zip(self.placeholders, *inputs, strict=True)

    def _inputs(self) -> list:
        names = [self.axes.joint.inputs[n.meta["desc"].idx].name if n not in self.axes.joint.tangents else "" for n in
                 self.placeholders]  # fmt: skip
        return [
            self.known[name] if name in self.known else self._random(n.meta["val"])
            for n, name in zip(self.placeholders, names, strict=True)
        ]

    def _random(self, like: object) -> object:
        if not isinstance(like, Tensor):
            return int(like)
        if like.dtype == torch.bool:
            return torch.rand(like.shape, generator=self.generator) < 0.5
        if not like.is_floating_point():
            return torch.randint(0, 2, like.shape, generator=self.generator, dtype=like.dtype)
        strided = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return strided.copy_(torch.randn(like.shape, generator=self.generator, dtype=like.dtype))

    def _joined(self, rest: list, own: list, j: int) -> list:
        """`rest` with sample j taken from `own`."""
        result = []
        for node, a, b in self._each(rest, own):
            state = self.axes[node]
            if isinstance(state, Batched):
                a = a.clone()
                _slices(a, state, self.batch).select(state.dim + 1, j).copy_(
                    _slices(b, state, self.batch).select(state.dim + 1, j)
                )
            result.append(a)
        return result

    def _run(self, inputs: list, overwrite: dict | None = None) -> dict[str, object]:
        run = _Run(self.module, overwrite)
        run.run(*inputs, enable_io_processing=False)
        return run.values

    def _check(self, name: str, state: object, j: int, *values: object) -> None:
        if isinstance(state, tuple):
            for i, s in enumerate(state):
                self._check(f"{name}[{i}]", s, j, *[v[i] for v in values])
            return
        before, after, others, others_after = values
        if not isinstance(before, Tensor):
            return
        claim = f"{name} {list(before.shape)} is claimed to be '{state}'"
        if isinstance(state, Constant):
            _equal(before, after, f"{claim}, but sample {j} moves it")
            _equal(before, others, f"{claim}, but samples move it")
            if state.zero:
                _equal(before, torch.zeros_like(before), f"{claim}, but it is not zero")
        elif isinstance(state, Batched):
            rest = [b for b in range(self.batch) if b != j]
            old, new = (_slices(v, state, self.batch).unbind(state.dim + 1) for v in (before, after))
            for b in rest:
                _equal(old[b], new[b], f"{claim}, but sample {j} moves the slice of sample {b}")
        elif isinstance(state, Reduced):
            change, change_beside_others = _wide(before) - _wide(after), _wide(others) - _wide(others_after)
            _equal(change, change_beside_others, f"{claim}, but what sample {j} adds depends on the other samples")

    def _check_linear(self, inputs: list, values: dict[str, object]) -> None:
        reduced = {n: s for n, s in self.states.items() if isinstance(s, Reduced)}
        sums = {p for s in reduced.values() for p in s.points}
        names = {}  # the nodes whose results are the sums
        for point in sums:
            if point.output is None:
                names[point.node.name] = point
            for user in point.node.users if point.output is not None else ():
                if user.target is operator.getitem and user.args[1] == point.output:
                    names[user.name] = point
        p, q = ({n: self._random(values[n]) for n in names} for _ in range(2))
        runs = [self._run(inputs, o) for o in (p, q, {n: p[n] + q[n] for n in names})]
        for name, state in reduced.items():
            left, right, both = (_wide(run[name]) for run in runs)
            _equal(left + right, both, f"{name} is claimed to be '{state}', but is not linear in these sums")


def _slices(value: Tensor, state: Batched, batch: int) -> Tensor:
    """The value with its batch dimension split in (outer, B, inner)."""
    sizes = [int(state.outer), batch, int(state.inner)]
    if value.shape[state.dim] != sizes[0] * sizes[1] * sizes[2]:
        raise Unsound(f"{list(value.shape)} has no {state}")
    return value.unflatten(state.dim, sizes)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.float64)


def _equal(a: Tensor, b: Tensor, otherwise: str) -> None:
    a, b = _wide(a), _wide(b)
    if not torch.allclose(a, b, rtol=1e-7, atol=1e-8, equal_nan=True):
        raise Unsound(otherwise)
