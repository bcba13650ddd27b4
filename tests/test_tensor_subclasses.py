"""Tensor subclasses in a compiled region: AOTAutograd takes them apart, tangents and gradients too. Refused, always.

A release that is not recognised as one would leave the region unclipped, without noise, and with a receipt.
"""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import flashdp_compile  # noqa: F401  registers the backend
from flashdp_compile.errors import FlashDPError, Refusal

WIDTH = 6


def jagged(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 1, 3, len(values)]))


class MakesNested(nn.Module):
    """Plain tensors in, a nested one out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, x, offsets):
        return torch.nested.nested_tensor_from_jagged(self.linear(x), offsets)


class LossInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.linear(x).values().square().sum()


def nested():
    return (jagged(torch.randn(7, WIDTH)),)


CASES = {
    "a nested tensor in and out": (lambda: nn.Linear(WIDTH, 3), nested, lambda y: y.values().sum()),
    "several layers": (lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.LayerNorm(5)), nested, lambda y: y.values().sum()),
    "a nested tensor in, the loss inside": (LossInside, nested, lambda loss: loss),
    "a nested tensor out": (
        MakesNested,
        lambda: (torch.randn(4, WIDTH), torch.tensor([0, 1, 3, 4])),
        lambda y: y.values().sum(),
    ),
    "another subclass": (
        lambda: nn.Linear(WIDTH, 3),
        lambda: (TwoTensor(torch.randn(4, WIDTH), torch.randn(4, WIDTH)),),
        lambda y: y.sum(),
    ),
}


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_refused(name, compiler):
    make, batch, loss = CASES[name]
    model = make()
    options = {"compiler": compiler, "loss_reduction": "sum"}
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    with pytest.raises(Refusal, match="ensor subclass"):
        loss(compiled(*batch())).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_is_a_subclass():
    model = nn.Linear(WIDTH, 3, bias=False)
    model.weight = nn.Parameter(TwoTensor(model.weight.detach().clone(), model.weight.detach().clone()))
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options={"compiler": "eager"})
    with pytest.raises(FlashDPError, match="ensor subclass"):
        compiled(torch.randn(4, WIDTH)).sum(1).mean().backward()


def test_without_gradients_they_are_none_of_our_business():
    model = nn.Linear(WIDTH, 3)
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options={"compiler": "inductor"})
    (x,) = nested()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).values(), model(x).values())
