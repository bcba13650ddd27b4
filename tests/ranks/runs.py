"""Private runs as one of several ranks, and what they must give: a model in each of the ways in which it can be a
replica, and its share of the samples."""

import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.runs import BOUND, clipped_sum, copies, engine, mlp, moved, samples

WAYS = ("inside", "around", "none")  # the compiled model is inside of DistributedDataParallel, or around it


class Net(nn.Module):
    """`mlp` as a class of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Heads(nn.Module):
    """How the sum of its weight lies in memory depends on the number of samples, as that of `Images`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bti,hio->btho", x[:, None], self.weight).flatten(1)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters = nn.Conv2d(3, 4, 3)
        self.register_buffer("pattern", torch.randn(1, 1, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = (x[:, :, None, None] * self.pattern).contiguous(memory_format=torch.channels_last)
        return self.filters(images).flatten(1)


def as_replica(its, model: nn.Module, way: str, **settings):
    """What the ranks call. A single process is a group of one here."""
    if way == "none":
        return its.compile(model)
    if way == "inside":
        return DistributedDataParallel(its.compile(model), **settings)
    return its.compile(DistributedDataParallel(model, **settings))


def setup(way: str = "around", root=mlp, lr: float = 1.0, **settings):
    """An engine, a model, what to call, and an attached optimizer."""
    its, model = engine(**settings), root()
    called = as_replica(its, model, way)
    return its, model, called, its.attach(torch.optim.SGD(model.parameters(), lr=lr))


def share(rank: int, size: int, rows: Tensor | None = None) -> Tensor:
    return (samples() if rows is None else rows).tensor_split(size)[rank]


def backward(called: nn.Module, x: Tensor) -> None:
    """Of a mean over the rows, also if there are none."""
    called(x).square().sum(1).sum().div(max(len(x), 1)).backward()


def take_steps(its, called, optimizer, rows: list[Tensor]) -> None:
    for x in rows:
        optimizer.zero_grad()
        backward(called, x)
        optimizer.step()


def expected(model: nn.Module, x: Tensor, clipping: str = "flat") -> list[Tensor]:
    """In float64, sample by sample."""
    if clipping == "flat":
        return clipped_sum(model, x)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    total = []
    for layer in layers:
        total += _of_layer(model, layer, x, BOUND / math.sqrt(len(layers)))
    return total


def _of_layer(model: nn.Module, layer: nn.Module, x: Tensor, bound: float) -> list[Tensor]:
    parameters, total = list(layer.parameters()), None
    for row in x.split(1):
        grads = [g.double() for g in torch.autograd.grad(model(row).square().sum(), parameters)]
        weight = min(1.0, bound / float(torch.cat([g.flatten() for g in grads]).norm())) / 8
        total = [weight * g + (0 if total is None else total[k]) for k, g in enumerate(grads)]
    return total


def close(found: list[Tensor], truth: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in zip(found, truth, strict=True))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def text_of(action) -> str | None:
    """Of what it raises."""
    try:
        action()
    except Exception as error:
        return " ".join(str(error).split())
    return None


__all__ = ["as_replica", "backward", "close", "copies", "expected", "moved", "same", "setup", "share", "take_steps"]
__all__ += ["text_of"]
