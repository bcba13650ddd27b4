"""Steps made by hand, sample by sample: a right one, and what goes wrong with others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

BOUND = 0.1


def mlp(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), norm or nn.Tanh(), nn.Linear(5, 2))


def data(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, generator=generator), torch.randint(0, 2, (count,), generator=generator)


def losses(model, batch) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def gradients(model: nn.Module, batch, weights: Tensor) -> list[dict[str, Tensor]]:
    """Of the loss of each sample, in the batch that it comes with."""
    parameters = dict(model.named_parameters())
    found = []
    for loss in losses(model, batch) * weights:
        own = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        found.append(dict(zip(parameters, own, strict=True)))
    return found


def norm(gradient: dict[str, Tensor], names=None) -> float:
    return float(torch.cat([g.flatten() for name, g in gradient.items() if names is None or name in names]).norm())


def total(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def scaled(gradient: dict[str, Tensor], factor: float, names=None) -> dict[str, Tensor]:
    return {name: g * (factor if names is None or name in names else 1.0) for name, g in gradient.items()}


def factor(length: float, bound: float = BOUND) -> float:
    return min(1.0, bound / max(length, 1e-30))


def right(own):
    return total([scaled(g, factor(norm(g))) for g in own])


def unclipped(own):
    return total(own)


def a_little_too_long(own):
    """By more than slack."""
    return total([scaled(g, factor(norm(g), 1.005 * BOUND)) for g in own])


def layer_left_out_of_the_norm(own):
    names = ("0.weight", "0.bias")
    return total([scaled(g, factor(norm(g, names))) for g in own])


def layer_left_unclipped(own):
    names = ("0.weight", "0.bias")
    return total([scaled(g, factor(norm(g, names)), names) for g in own])


def each_parameter_by_itself(own):
    """With the whole bound for each."""
    return total([{name: t * factor(float(t.norm())) for name, t in g.items()} for g in own])


def sum_is_clipped(own):
    """To the bound of the batch: no sample's share is bounded, as the others' depends on it."""
    summed = total(own)
    return scaled(summed, factor(norm(summed), len(own) * BOUND))


def weight_of_the_next(own):
    return total([scaled(g, factor(norm(n))) for g, n in zip(own, own[1:] + own[:1], strict=True)])


BROKEN = (
    unclipped,
    a_little_too_long,
    layer_left_out_of_the_norm,
    layer_left_unclipped,
    each_parameter_by_itself,
    sum_is_clipped,
    weight_of_the_next,
)


def step(model: nn.Module, mechanism: Callable):
    return lambda batch, weights: mechanism(gradients(model, batch, weights))
