"""Random models as short Python programs, printed by hypothesis when they fail.

A program keeps for every value where its samples are (dim, outer, inner), None for constants, LOST after a wild step.
Safe steps leave the samples apart, and the axes pass must accept a program of safe steps alone. A wild step takes any
dimension, the batch as well, and the pass may accept or refuse it; if it accepts, the oracle judges.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, permutations
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

LOST = "lost"
_files = count()


@dataclass
class Value:
    name: str
    tensor: Tensor
    axis: Any

    @property
    def rank(self) -> int:
        return self.tensor.dim()

    @property
    def alone(self) -> bool:
        """The batch is a dimension of its own."""
        return isinstance(self.axis, tuple) and self.axis[1:] == (1, 1)


@dataclass
class Program:
    """Lines of a forward(self, x, y, ids) and the module that runs them."""

    B: int
    T: int
    d: int
    lines: list[str] = field(default_factory=list)
    result: str = ""
    wild: bool = False

    def __repr__(self) -> str:
        return f"B={self.B}, T={self.T}, d={self.d}\n{self.source()}"

    def source(self) -> str:
        body = "".join(f"    {line}\n" for line in self.lines)
        return f"def forward(self, x, y, ids):\n{body}    return {self.result}\n"

    def inputs(self) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(0)
        return (
            torch.randn(self.B, self.T, self.d, generator=g, dtype=torch.float64),
            torch.randn(self.B, self.d, generator=g, dtype=torch.float64),
            torch.randint(0, 2, (self.B, self.T), generator=g),
        )

    def module(self) -> nn.Module:
        name = f"<program {next(_files)}>"
        source = self.source()
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        scope: dict[str, Any] = {"torch": torch, "F": nn.functional}
        exec(compile(source, name, "exec"), scope)  # noqa: S102
        cls = type("Net", (_Net,), {"forward": scope["forward"]})
        return cls(self.B, self.T, self.d)


class _Net(nn.Module):
    """w [d, d], p [T, d] and q [d] are parameters; the rest are constants of every shape that may meet the batch."""

    def __init__(self, B: int, T: int, d: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(d, d, generator=g, dtype=torch.float64))
        self.p = nn.Parameter(torch.randn(T, d, generator=g, dtype=torch.float64))
        self.q = nn.Parameter(torch.randn(d, generator=g, dtype=torch.float64))
        self.register_buffer("c_bd", torch.randn(B, d, generator=g, dtype=torch.float64))
        self.register_buffer("c_bb", torch.randn(B, B, generator=g, dtype=torch.float64))
        for size in {B, T, d}:
            self.register_buffer(f"order_{size}", torch.arange(size).flip(0))


class Builder:
    """Adds steps to a program; every step is run at once, so that shapes are known and bad steps are left out."""

    def __init__(self, choose: Callable[[int], int], B: int, T: int, d: int) -> None:
        self.choose, self.program = choose, Program(B, T, d)
        self.module = _Net(B, T, d)
        x, y, ids = self.program.inputs()
        self.scope = {"torch": torch, "F": nn.functional, "self": self.module, "x": x, "y": y, "ids": ids}
        self.values: list[Value] = []
        self.B, self.T, self.d = B, T, d

    def add(self, text: str, axis: Any) -> bool:
        try:
            tensor = eval(text, self.scope)  # noqa: S307
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False
        if not isinstance(tensor, Tensor) or tensor.dim() > 5 or not 0 < tensor.numel() <= 2000:
            return False
        if isinstance(axis, tuple):
            assert tensor.shape[axis[0]] == axis[1] * self.B * axis[2], (text, axis, tensor.shape)
        name = f"v{len(self.values)}"
        self.program.lines.append(f"{name} = {text}")
        self.scope[name] = tensor
        self.values.append(Value(name, tensor, axis))
        return True

    def pick(self, options: list[Any]) -> Any:
        return options[self.choose(len(options))]

    def value(self) -> Value:
        """Any value so far, the latest one most often."""
        return self.values[-1] if self.choose(3) else self.pick(self.values)

    def dim(self, v: Value, wild: bool) -> int | None:
        """A dimension to work along: off the batch, unless wild."""
        if wild and isinstance(v.axis, tuple) and self.choose(3):
            return v.axis[0]
        dims = [i for i in range(v.rank) if wild or v.axis in (None, LOST) or i != v.axis[0]]
        return self.pick(dims) if dims else None

    def partner(self, v: Value) -> Value | None:
        """A value of the same shape whose samples lie alike."""
        found = [u for u in self.values if u.tensor.shape == v.tensor.shape and u.axis in (v.axis, LOST)]
        return self.pick(found) if found else None


def _dropped(v: Value, dim: int) -> Any:
    return (v.axis[0] - (dim < v.axis[0]), *v.axis[1:]) if isinstance(v.axis, tuple) else v.axis


def _inserted(v: Value, dim: int) -> Any:
    return (v.axis[0] + (dim <= v.axis[0]), *v.axis[1:]) if isinstance(v.axis, tuple) else v.axis


def _after(v: Value, dim: int | None, axis: Any) -> Any:
    """The axis after a step along `dim`: lost if that was the batch."""
    return LOST if isinstance(v.axis, tuple) and dim == v.axis[0] else axis


def pointwise(b: Builder, v: Value, wild: bool) -> bool:
    form = b.pick(["{}.tanh()", "{}.sin()", "{}.sigmoid()", "{}.relu()", "{} * 0.5 - 0.1", "-{}.abs()", "{}.clamp(-1, 1)",  # noqa: E501
                   "{0}.masked_fill({0} > 0, 0.5)", "torch.where({0} > 0, {0}, {0} * 0.1)", "F.gelu({})"])  # fmt: skip
    return b.add(form.format(v.name), v.axis)


def combine(b: Builder, v: Value, wild: bool) -> bool:
    u = b.pick(b.values) if wild else b.partner(v)
    if u is None:
        return False
    axis = v.axis if not wild or (u.axis == v.axis and u.rank == v.rank) else LOST
    return b.add(b.pick(["{} + {}", "{} * {}", "torch.maximum({}, {})", "torch.where({0} > {1}, {0}, {1})"]).format(
        v.name, u.name), axis)  # fmt: skip


def with_constant(b: Builder, v: Value, wild: bool) -> bool:
    constants = {
        "self.p": b.module.p,
        "self.c_bd": b.module.c_bd,
        "self.c_bb": b.module.c_bb,
        "self.p[0]": b.module.p[0],
        "self.q": b.module.q,
    }
    fits = [
        n for n, c in constants.items()
        if c.dim() <= v.rank and all(s == t for s, t in zip(c.shape[::-1], v.tensor.shape[::-1], strict=False))
    ]  # fmt: skip
    # a constant that is laid out along the batch tells the samples' places: that is refused, rightly
    if not wild and isinstance(v.axis, tuple):
        fits = [n for n in fits if v.axis[0] < v.rank - constants[n].dim()]
    if not fits:
        return False
    return b.add(b.pick(["{} * {}", "{} + {}", "{} - {}"]).format(v.name, b.pick(fits)), v.axis)


def linear(b: Builder, v: Value, wild: bool) -> bool:
    if v.tensor.shape[-1] != b.d or (not wild and v.axis is not None and v.axis != LOST and v.axis[0] == v.rank - 1):
        return False
    form = b.pick(
        ["{} @ self.w", "F.linear({}, self.w)", "F.linear({}, self.w, self.p[0])", "F.linear({}, self.w, self.q)"]
    )
    return b.add(form.format(v.name), _after(v, v.rank - 1, v.axis))


def permute(b: Builder, v: Value, wild: bool) -> bool:
    if v.rank < 2:
        return False
    order = b.pick(list(permutations(range(v.rank)))[1:])
    axis = (order.index(v.axis[0]), *v.axis[1:]) if isinstance(v.axis, tuple) else v.axis
    return b.add(f"{v.name}.permute({', '.join(map(str, order))})", axis)


def flatten(b: Builder, v: Value, wild: bool) -> bool:
    if v.rank < 2:
        return False
    i = b.choose(v.rank - 1)
    axis = v.axis
    if isinstance(axis, tuple):
        dim, outer, inner = axis
        if dim == i:
            axis = (i, outer, inner * v.tensor.shape[i + 1])
        elif dim == i + 1:
            axis = (i, outer * v.tensor.shape[i], inner)
        elif dim > i + 1:
            axis = (dim - 1, outer, inner)
    return b.add(f"{v.name}.flatten({i}, {i + 1})", axis)


def unflatten(b: Builder, v: Value, wild: bool) -> bool:
    """Splits a dimension; that of the batch at the edges of its factors."""
    i = b.choose(v.rank)
    size, axis = v.tensor.shape[i], v.axis
    whole = not isinstance(axis, tuple) or axis[0] != i
    if whole or wild:
        splits = [(k, size // k) for k in range(1, size + 1) if size % k == 0]
    else:
        _, outer, inner = axis
        splits = [(k, size // k) for k in range(1, outer + 1) if outer % k == 0]
        splits += [(size // k, k) for k in range(1, inner + 1) if inner % k == 0]
    left, right = b.pick(splits)
    if not whole and wild:
        axis = LOST
    elif not whole:
        _, outer, inner = axis
        in_right = right % (b.B * inner) == 0 and left * (right // (b.B * inner)) == outer
        axis = (i + 1, outer // left, inner) if in_right else (i, outer, inner // right)
    elif isinstance(axis, tuple) and axis[0] > i:
        axis = (axis[0] + 1, *axis[1:])
    return b.add(f"{v.name}.unflatten({i}, ({left}, {right}))", axis)


def reshape(b: Builder, v: Value, wild: bool) -> bool:
    if not wild:
        return unflatten(b, v, wild)
    shape = b.pick(list(permutations(v.tensor.shape)))
    return b.add(f"{v.name}.reshape({', '.join(map(str, shape))})", LOST)


def squeeze(b: Builder, v: Value, wild: bool) -> bool:
    i = b.choose(v.rank + 1)
    if i < v.rank and v.tensor.shape[i] == 1 and v.rank > 1:
        return b.add(f"{v.name}.squeeze({i})", _dropped(v, i))
    return b.add(f"{v.name}.unsqueeze({i})", _inserted(v, i))


def join(b: Builder, v: Value, wild: bool) -> bool:
    u = b.partner(v)
    if u is None:
        return False
    if b.choose(2):
        i = b.choose(v.rank + 1)
        return b.add(f"torch.stack([{v.name}, {u.name}], {i})", _inserted(v, i))
    i = b.choose(v.rank)
    axis = v.axis
    if isinstance(axis, tuple) and i == axis[0]:
        axis = (i, 2 * axis[1], axis[2])
    return b.add(f"torch.cat([{v.name}, {u.name}], {i})", axis)


def pieces(b: Builder, v: Value, wild: bool) -> bool:
    i = b.dim(v, wild)
    if i is None:
        return False
    size = v.tensor.shape[i]
    if b.choose(2) and v.rank > 1:
        return b.add(f"{v.name}.select({i}, {b.choose(size)})", _after(v, i, _dropped(v, i)))
    start = b.choose(size)
    length = 1 + b.choose(size - start)
    form = b.pick([f"narrow({i}, {start}, {length})", f"chunk({2 if size > 1 else 1}, {i})[0]"])
    return b.add(f"{v.name}.{form}", _after(v, i, v.axis))


def along(b: Builder, v: Value, wild: bool) -> bool:
    i = b.dim(v, wild)
    if i is None:
        return False
    form = b.pick(["flip({})", "roll(1, {})", "cumsum({})", "softmax({})", "log_softmax({})", "sort({}).values",
                   "cummax({}).values", "tanh().cumprod({})"])  # fmt: skip
    return b.add(f"{v.name}.{form.format(i)}", _after(v, i, v.axis))


def reduce(b: Builder, v: Value, wild: bool) -> bool:
    i = b.dim(v, wild)
    if i is None or (v.rank == 1 and not wild):
        return False
    keep = b.choose(2)
    form = b.pick(["sum({}, {})", "mean({}, {})", "amax({}, {})", "max({}, {}).values", "norm(2, {}, {})",
                   "logsumexp({}, {})", "var({}, correction=0, keepdim={})", "median({}, {}).values", "prod({}, {})",
                   "argmax({}, {}).double()", "topk(1, {}).values + 0 * {}"])  # fmt: skip
    keeps = keep or "topk" in form
    return b.add(f"{v.name}.{form.format(i, bool(keep))}", _after(v, i, v.axis if keeps else _dropped(v, i)))


def centre(b: Builder, v: Value, wild: bool) -> bool:
    """A statistic that is put back beside the values it was taken from."""
    i = b.dim(v, wild)
    if i is None:
        return False
    form = b.pick(["{0} - {0}.mean({1}, True)", "{0} / (1 + {0}.square().sum({1}, True))", "{0} * {0}.amax({1}, True)"])
    return b.add(form.format(v.name, i), _after(v, i, v.axis))


def normalise(b: Builder, v: Value, wild: bool) -> bool:
    if not wild and isinstance(v.axis, tuple) and v.axis[0] == v.rank - 1:
        return False
    size = v.tensor.shape[-1]
    scale = b.pick(["", ", self.q", ", None, self.q"]) if size == b.d else ""
    return b.add(f"F.layer_norm({v.name}, ({size},){scale})", _after(v, v.rank - 1, v.axis))


def by_index(b: Builder, v: Value, wild: bool) -> bool:
    i = b.dim(v, wild)
    if i is None or v.tensor.shape[i] not in (b.B, b.T, b.d):
        return False
    order = f"self.order_{v.tensor.shape[i]}"
    form = b.pick(["{v}.index_select({i}, {o})", "{v}[{colons}{o}]", "{v}.gather({i}, {v}.argsort({i}))",
                   "{v}.index_add({i}, {o}, {v})", "{v}.scatter({i}, {v}.argsort({i}), {v})",
                   "{v}.scatter_add({i}, {v}.argsort({i}), {v})", "{v}.index_copy({i}, {o}, {v})"])  # fmt: skip
    return b.add(form.format(v=v.name, i=i, o=order, colons=":, " * i), _after(v, i, v.axis))


def lookup(b: Builder, v: Value, wild: bool) -> bool:
    forms = [("F.embedding(ids, self.p)", (0, 1, 1)), ("self.p[ids]", (0, 1, 1)), ("self.c_bd[ids]", (0, 1, 1))]
    if v.alone and v.axis[0] == 0 and v.rank >= 2 and v.tensor.shape[1] >= 2:
        rows = f"torch.arange({b.B})"
        forms.append((f"{v.name}[{rows}, ids[:, 0]]", (0, 1, 1)))
        forms.append((f"{v.name}[{rows}[:, None], ids]", (0, 1, 1)))
    if wild:
        forms = [(f"{v.name}[ids]", LOST), (f"{v.name}[ids[:, 0]]", LOST), (f"{v.name}[torch.arange({b.T}), ids[0]]", LOST),  # noqa: E501
                 (f"{v.name}[torch.arange({v.tensor.shape[0]}), torch.arange({v.tensor.shape[0]})]", LOST),
                 (f"{v.name}[self.order_{b.B}, torch.arange({b.B})]", LOST)]  # fmt: skip
    return b.add(*b.pick(forms))


def products(b: Builder, v: Value, wild: bool) -> bool:
    u = b.partner(v)
    if u is None or v.rank < 2:
        return False
    inside = isinstance(v.axis, tuple) and v.axis[0] < v.rank - 2 and v.rank > 2
    if not wild and not inside:
        return False
    axis = v.axis if inside else LOST
    form = b.pick(["{} @ {}.mT", "{}.mT @ {}", "torch.einsum('...ij,...kj->...ik', {}, {})"])
    return b.add(form.format(v.name, u.name), axis)


def repeat(b: Builder, v: Value, wild: bool) -> bool:
    i = b.choose(v.rank)
    counts = [1] * v.rank
    counts[i] = 2
    axis = v.axis
    if isinstance(axis, tuple) and axis[0] == i:
        axis = (i, 2 * axis[1], axis[2])
    return b.add(f"{v.name}.repeat({', '.join(map(str, counts))})", axis)


def windows(b: Builder, v: Value, wild: bool) -> bool:
    i = b.dim(v, wild)
    if i is None:
        return False
    pad = [0] * (2 * v.rank)
    pad[2 * (v.rank - 1 - i)] = 1
    form = b.pick([f"{v.name}.unfold({i}, 1, 1)", f"F.pad({v.name}, {tuple(pad)})"])
    return b.add(form, _after(v, i, v.axis))


def corners(b: Builder, v: Value, wild: bool) -> bool:
    if v.rank < 2:
        return False
    safe = not isinstance(v.axis, tuple) or v.axis[0] < v.rank - 2
    if not safe and not wild:
        return False
    form = b.pick(["{}.tril()", "{}.triu(1)"] + ["{}.diagonal(0, -2, -1)"] * wild)  # its backward has no rule
    return b.add(form.format(v.name), v.axis if safe else LOST)


def spread(b: Builder, v: Value, wild: bool) -> bool:
    """Constants that are widened to a size, of the batch or of another dimension that happens to be as large."""
    form = b.pick([f"self.p.expand({b.B}, {b.T}, {b.d})", f"(self.p @ self.w).expand({b.B}, {b.T}, {b.d})"])
    if v.tensor.shape != (b.B, b.T, b.d) or not (wild or v.axis in (None, LOST) or v.axis == (0, 1, 1)):
        return False
    return b.add(f"{form} * {v.name}", v.axis)


def written(b: Builder, v: Value, wild: bool) -> bool:
    """Values that are put into other tensors, at places that are the same for all samples."""
    i = b.dim(v, wild)
    if i is None or v.rank < 2:
        return False
    form = b.pick([f"torch.select_scatter({v.name}, {v.name}.select({i}, 0).tanh(), {i}, 1)",
                   f"torch.slice_scatter({v.name}, {v.name}.narrow({i}, 0, 1) * 2, {i}, 1, 2)",
                   f"torch.zeros_like({v.name}).index_add({i}, self.order_{b.T}, {v.name})"])  # fmt: skip
    return b.add(form, _after(v, i, v.axis))


STEPS = (pointwise, combine, with_constant, linear, permute, flatten, unflatten, reshape, squeeze, join, pieces, along,
         reduce, centre, normalise, by_index, lookup, products, repeat, windows, corners, spread, written)  # fmt: skip


# those that take any dimension when they are wild
WILD_STEPS = (combine, linear, unflatten, reshape, pieces, along, reduce, centre, normalise, by_index, lookup, products,
              windows, corners, written)  # fmt: skip

STARTS = (
    "x @ self.w",
    "F.linear(y, self.w)",
    "F.linear(x, self.w, self.q)",
    "x * self.p",
    "F.embedding(ids, self.p)",
    "(F.embedding(ids, self.p) @ self.w) * self.q",
    "(x + self.p).tanh()",
)


@st.composite
def programs(draw: Any, wild: bool) -> Program:
    """A program of one to seven steps, wild or all of them safe; equal sizes are frequent."""

    def choose(n: int) -> int:
        return draw(st.integers(0, n - 1)) if n > 1 else 0

    return random_program(choose, wild)


def random_program(choose: Callable[[int], int], wild: bool) -> Program:
    """A program as `programs` draws it; `choose(n)` gives a number below n."""
    equal = choose(2)
    B = 2 + choose(3)
    T, d = (B, B) if equal else (2 + choose(3), 2 + choose(3))
    b = Builder(choose, B, T, d)
    first = choose(len(STARTS))
    for k in (first, first + 1 + choose(len(STARTS) - 1)):
        b.add(STARTS[k % len(STARTS)], (0, 1, 1))
    b.add("x", (0, 1, 1))
    length = 1 + choose(7)
    surely = choose(length) if wild else -1
    for k in range(length):
        go_wild = wild and (k == surely or choose(3) == 2)
        b.pick(WILD_STEPS if go_wild else STEPS)(b, b.value(), go_wild)
    b.program.wild = any(v.axis == LOST for v in b.values)
    _finish(b)
    return b.program


def _finish(b: Builder) -> None:
    """Returns a value that the parameters reach, as it is or as a loss, most often together with another one."""
    reached = [v for v in b.values if v.tensor.requires_grad and v.axis is not None]
    lost = [v for v in reached[:-1] if v.axis == LOST]
    last, other = reached[-1], b.pick(lost or reached[:-1] or reached)
    form = b.pick(
        [
            "{0}",
            "{0}, {1}.cos()",
            "{0}.sin().sum() + {1}.square().sum()",
            "{0}.square().mean()",
            "{0}.square().mean(), {1}",
        ]
    )
    b.program.result = form.format(last.name, other.name)
    assert math.prod(last.tensor.shape) > 0
