"""One backward through the compiled model, and what its plan said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flashdp_compile.pipeline
from flashdp_compile.passes.plan import Plan
from flashdp_compile.passes.strategies.catalogue import NAMES

QUIET = {"compiler": "eager", "noise_multiplier": 0.0}
STRATEGIES = (*NAMES, "auto")
CLIP_FNS = ("hard", "automatic", "normalize")
# rewrite_single and rewrite_empty have no plan; this is what they raise the noise by
SINGLE_SLACK, EMPTY_SLACK = 2.0**-20, 0.0


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, backend="flashdp", fullgraph=True, options={**QUIET, **options})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of p.grad, which is then cleared."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten().double() for v in values.values()])


@contextlib.contextmanager
def recorded_plans() -> Iterator[list[Plan]]:
    """Every plan that is made inside: what the noise is calibrated to."""
    plans: list[Plan] = []
    make_plan = flashdp_compile.pipeline.make_plan

    def recording(*args: Any, **kwargs: Any) -> Plan:
        plans.append(make_plan(*args, **kwargs))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashdp_compile.pipeline, "make_plan", recording)
        yield plans


@contextlib.contextmanager
def recorded_graphs() -> Iterator[list[fx.Graph]]:
    """Every joint graph that is rewritten inside, as it is after that."""
    graphs: list[fx.Graph] = []
    run = flashdp_compile.pipeline.run

    def recording(graph: fx.Graph, record: Any) -> None:
        run(graph, record)
        graphs.append(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashdp_compile.pipeline, "run", recording)
        yield graphs
