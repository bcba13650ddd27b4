"""A random model as the text of a module, grown line by line; every line is run at once, so that shapes are known.

A failing test prints this text, which runs by itself. `x` is the value so far; its first dimension is the batch.
"""

from __future__ import annotations

import linecache
import random
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE = 3  # samples in the run that tells shapes
_files = count()


@dataclass
class Sketch:
    """`setup` fills the module, `lines` are its forward, `inputs` {name: expression of B} are its arguments.

    kinds      the layers that were drawn, in order
    time_major whether every input holds the batch in dimension 1
    """

    rng: random.Random
    setup: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    time_major: bool = False

    def __post_init__(self) -> None:
        self.scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "self": nn.Module(), "B": PROBE}

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def chance(self, probability: float = 0.5) -> bool:
        return self.rng.random() < probability

    def size(self, low: int = 2, high: int = 6) -> int:
        return self.rng.randint(low, high)

    def part(self, text: str, *more: str) -> str:
        """A new attribute `self.name`; `more` are lines of the constructor where {} stands for it."""
        name = f"self.p{len(self.setup)}"
        for line in (f"{name} = {text}", *(line.format(name) for line in more)):
            exec(line, self.scope)
            self.setup.append(line)
        return name

    def parameter(self, *shape: int, scale: float = 0.5) -> str:
        sizes = ", ".join(map(str, shape)) if shape else "()"
        return self.part(f"nn.Parameter({scale} * torch.randn({sizes}))")

    def input(self, name: str, text: str) -> str:
        """A new argument [B, ...], as text that has the batch first; in a time-major model it is passed as [T, B]."""
        name = name if name == "x" else f"{name}{len(self.inputs)}"
        self.inputs[name] = f"({text}).transpose(0, 1)" if self.time_major else text
        self.scope[name] = eval(self.inputs[name], self.scope)
        return f"{name}.transpose(0, 1)" if self.time_major else name

    def add(self, *lines: str) -> None:
        for line in lines:
            exec(line, self.scope)
            self.lines.append(line)

    @property
    def x(self) -> Tensor:
        return self.scope["x"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of one sample of x."""
        return tuple(self.x.shape[1:])

    def source(self) -> str:
        setup = "".join(f"        {line}\n" for line in self.setup)
        body = "".join(f"        {line}\n" for line in self.lines)
        return (
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{setup}\n    def forward(self, {', '.join(self.inputs)}):\n{body}        return x\n"
        )

    def build(self) -> nn.Module:
        """The module; its lines are found by tracebacks."""
        name, source = f"<generated {next(_files)}>", self.source()
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn}
        exec(compile(source, name, "exec"), scope)
        return scope["Net"]()

    def arguments(self, size: int) -> tuple[Tensor, ...]:
        return tuple(eval(text, {"torch": torch, "B": size}) for text in self.inputs.values())
