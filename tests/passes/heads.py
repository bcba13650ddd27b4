"""A model whose head has the largest products, its rewritten graph, and what that gives."""

from __future__ import annotations

import dataclasses

import torch
from corrupt import NOISY
from pass_support import random_inputs, rewritten, run
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from flashdp_compile.passes.late.store_by_samples import store_by_samples
from flashdp_compile.passes.mechanism import Mechanism
from flashdp_compile.runtime import noise, scaling

flashdp = torch.ops.flashdp
BATCH = 8
SCALER = torch.amp.GradScaler("cpu", init_scale=64.0)
SCALER.scale(torch.zeros(()))  # it has a scale from now on
MECHANISMS = {
    "sum": NOISY,
    "mean": dataclasses.replace(NOISY, mean=True),
    "expected": dataclasses.replace(NOISY, mean=True, expected_batch_size=5),
    "automatic": dataclasses.replace(NOISY, clip_fn="automatic"),
    "normalize": dataclasses.replace(NOISY, clip_fn="normalize"),
    "scaled": dataclasses.replace(NOISY, grad_scaler=scaling.place(SCALER)),
    "scaled and within the bound": dataclasses.replace(NOISY, grad_scaler=scaling.place(SCALER), noise_multiplier=0.0),
}


class LanguageModel(nn.Module):
    """Checkpointed layers, which hold little, and a head whose products [B, 16, 800] are larger than all else."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 800, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + checkpoint(lambda y, layer=layer: layer(y).relu(), x, use_reentrant=False)
        return self.head(x).square().mean((1, 2))


class TwoHeads(LanguageModel):
    """Of which the second is the smaller one."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, 600, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.second(x).square().mean((1, 2))


def graph(
    clipping: object = "per_layer",
    model: nn.Module | None = None,
    strategy: str = "store",
    mechanism: Mechanism = NOISY,
    bound: float = 0.5,
) -> fx.Graph:
    x = torch.randn(BATCH, 12, 16)
    return rewritten(
        model or LanguageModel(), x, strategy=strategy, clipping=clipping, bound=bound, mechanism=mechanism
    ).joint.graph


def outputs(of: fx.Graph, inputs: list[object]) -> list[torch.Tensor]:
    noise.KEYS.reset()  # the same key for every run: the mechanism has a seed
    return [value for value in run(of, inputs) if isinstance(value, torch.Tensor)]


def made(of: fx.Graph) -> list[fx.Node]:
    return list(of.find_nodes(op="call_function", target=flashdp.clipped_product.default))


def the_same(of: fx.Graph, before: list[torch.Tensor], inputs: list[object]) -> None:
    """Its outputs are what they were before."""
    for was, now in zip(before, outputs(of, inputs), strict=True):
        torch.testing.assert_close(was, now, rtol=1e-6, atol=1e-7)


def taken(of: fx.Graph, count: int = 1, beside: int = 0) -> list[fx.Node]:
    """So many layers are made by samples, and the numbers stay; returns their nodes."""
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    assert store_by_samples(of, "cpu", beside) == count
    of.lint()
    the_same(of, before, inputs)
    return made(of)
