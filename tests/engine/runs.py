"""A small private run: a model, what its clipped sums must be, and an engine for samples that the test draws itself."""

import copy

import torch
from torch import Tensor, nn

from flashdp_compile import PrivacyEngine, accounting

BATCH = 8
BOUND = 0.5


def mlp(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def samples(count: int = BATCH) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1))


def engine(**settings) -> PrivacyEngine:
    """Without noise and without a loader, unless settings say otherwise."""
    own = {
        "target_delta": 1e-5,
        "expected_batch_size": BATCH,
        "noise_multiplier": 0.0,
        "steps": 100,
        "max_grad_norm": BOUND,
        "sampling": accounting.Fixed(10),
        "options": {"compiler": "eager"},
    }
    return PrivacyEngine(**{**own, **settings})


def clipped_sum(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Sum of the clipped gradients over BATCH, sample by sample in float64."""
    exact = copy.deepcopy(model).double()
    parameters = list(exact.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for row in x.double().split(1):
        grads = torch.autograd.grad(exact(row).square().sum(), parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, BOUND / float(norm)) / BATCH
    return total


def backward(compiled: nn.Module, x: Tensor) -> None:
    compiled(x).square().sum(1).mean().backward()


def setup(**settings):
    """An engine, a model, its compiled form, and SGD with a learning rate of 1."""
    its, model = engine(**settings), mlp()
    optimizer = its.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    return its, model, its.compile(model), optimizer


def moved(model: nn.Module, start: list[Tensor]) -> list[Tensor]:
    return [a - p.detach() for a, p in zip(start, model.parameters(), strict=True)]


def copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
