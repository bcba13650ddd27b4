"""Models that must be refused, because a sample's gradient depends on other samples or cannot be told from theirs.

The models are in the files refused_*.py, so a refusal that names the user's line names one of them. `words` are
alternatives in lower case, the op or the idea: a refusal must contain at least one of them. `mixes` says that a small
experiment can show the mixing (`mixes_samples`); the few others are refused because nothing in the graph tells whose
row is whose, because the loss is no sum over samples, or because data of the batch would reach a buffer unprotected.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.case import Model, as_float, map_tensors

SIZE, TIME, WIDTH = 6, 4, 5  # SQUARE models use SIZE for the width as well, so that a transpose fits


@dataclass(frozen=True)
class Refused:
    """A model, inputs with the batch first, and what the refusal must speak of."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    words: tuple[str, ...]
    mixes: bool = True


REFUSED: dict[str, Refused] = {}


def refuse(name: str, build: Callable[[], nn.Module], inputs: Callable, *words: str, mixes: bool = True) -> None:
    if name in REFUSED:
        raise ValueError(f"two refused models are called {name}")
    REFUSED[name] = Refused(name, build, inputs, words, mixes)


def refuse_layer(name: str, inputs: Callable, *words: str, mixes: bool = True):
    """Decorates `f(fc, x, ...)`: the model is that function with one linear layer, square in the inputs' last size."""

    def add(function: Callable) -> Callable:
        def build() -> nn.Module:
            width = inputs()[0].shape[-1]
            return Model(lambda m, *args: function(m.fc, *args), fc=nn.Linear(width, width))

        refuse(name, build, inputs, *words, mixes=mixes)
        return function

    return add


def rows() -> tuple[Tensor]:
    return (torch.randn(SIZE, WIDTH),)


def square() -> tuple[Tensor]:
    return (torch.randn(SIZE, SIZE),)


def sequences() -> tuple[Tensor]:
    return (torch.randn(SIZE, TIME, WIDTH),)


def cube() -> tuple[Tensor]:
    return (torch.randn(SIZE, SIZE, SIZE),)


def labelled() -> tuple[Tensor, Tensor]:
    return torch.randn(SIZE, WIDTH), torch.randint(0, WIDTH, (SIZE,))


def mixes_samples(refused: Refused, seed: int = 0) -> bool:
    """Whether the gradient is not a sum of one term per sample, found by experiment in float64.

    The loss is the model's own if it gives a scalar; else some loss outside that is not linear and has a weight for
    every output, which is data of that row's sample. A sum of per-sample terms has no mixed second difference: G(i and
    j changed) - G(i changed) - G(j changed) + G(none changed) = 0 for every pair of samples.
    """
    torch.manual_seed(seed)
    model = refused.build().double()
    data = [map_tensors(as_float(torch.float64), refused.inputs()) for _ in range(2)]
    shape = copy.deepcopy(model)(*data[0]).shape
    weights = [torch.rand(shape, dtype=torch.float64) + 0.5 if shape else torch.ones(()) for _ in range(2)]

    def pick(pair: list[Tensor], changed: tuple[int, ...]) -> Tensor:
        tensor = pair[0].clone()
        if tensor.dim() and tensor.shape[0] == SIZE:
            for index in changed:
                tensor[index] = pair[1][index]
        return tensor

    def gradient(*changed: int) -> Tensor:
        torch.manual_seed(seed)
        trial = copy.deepcopy(model)
        output = trial(*(pick([a, b], changed) for a, b in zip(*data, strict=True)))
        loss = ((output + output.square()) * pick(weights, changed)).sum() if shape else output
        found = torch.autograd.grad(loss, list(trial.parameters()), allow_unused=True)
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])

    base, alone = gradient(), [gradient(i) for i in range(SIZE)]
    for i in range(SIZE):
        for j in range(i):
            mixed = gradient(i, j) - alone[i] - alone[j] + base
            if float(mixed.norm()) > 1e-9 * float(base.norm()):
                return True
    return False
