"""What a whole model is: made by its library, untouched, with random weights, and trained as a case of the zoo."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from zoo import Case
from zoo.case import Tree


@dataclass(frozen=True)
class Task:
    """What a model is trained on: size -> targets, and (output, targets) -> the losses [B] of the samples."""

    targets: Callable[[int], Tree]
    loss: Callable[[Any, Tree], Tensor]


@dataclass(frozen=True)
class Whole:
    """A model and how it is trained.

    title    its name in docs/coverage.md
    library  the package that makes it, or "" for plain code
    build    keyword settings -> the module in training mode; the library is imported there, and not before
    inputs   size -> the inputs, a dict where they are named
    still    the settings that switch dropout off; without them it is what the library's defaults say
    """

    title: str
    library: str
    build: Callable[..., nn.Module]
    inputs: Callable[[int], tuple | dict]
    task: Task
    still: Mapping[str, Any] = field(default_factory=dict)

    def case(self, dropout: bool = False) -> Case:
        settings = {} if dropout else self.still
        return Case(lambda: self.build(**settings), self.inputs, self.task.targets, self.task.loss, name=self.title)

    def need(self) -> None:
        """Skips a test where the library is missing, or cannot be imported."""
        try:
            import_module(self.library or "torch")
        except Exception as error:  # timm needs torchvision, which raises RuntimeError beside another torch
            pytest.skip(f"{self.library} cannot be imported: {error}")

    def traced(self) -> bool:
        """Whether torch.compile makes one graph of it with the backend that runs a graph as it is."""
        torch._dynamo.reset()
        case = self.case()
        try:
            case.losses(torch.compile(case.model(), backend="eager", fullgraph=True), case.batch(2))
        except Unsupported:
            return False
        return True

    @property
    def version(self) -> str:
        return f"{self.library} {version(self.library)}" if self.library else "plain code"


def names_of(library: str) -> Callable[[str], Any]:
    """Looks names up in a library, which is imported with the first of them."""
    return lambda name: getattr(import_module(library), name)
