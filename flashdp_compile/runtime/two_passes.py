"""Outputs of a model whose backward runs twice for one call of backward(): for norms, then for clipped sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.compat import tree_map
from flashdp_compile.errors import FlashDPError
from flashdp_compile.runtime.part_runs import PartRuns
from flashdp_compile.runtime.release import LEDGER


def backward_twice(outputs: Any, runs: PartRuns, between: Callable[[], None]) -> Any:
    """The same outputs, which have one autograd node for the whole graph behind them. `between` is called between the
    two runs."""
    inner: list[Tensor] = []

    def collect(value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad and all(value is not known for known in inner):
            inner.append(value)
        return value

    tree_map(collect, outputs)
    if not inner:
        return outputs
    anchor = torch.zeros((), requires_grad=True)  # or autograd would see nothing to do
    outer = _Twice.apply(anchor, inner, runs, between)
    places = {id(value): place for place, value in enumerate(inner)}
    return tree_map(lambda value: outer[places[id(value)]] if id(value) in places else value, outputs)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: Tensor, inner: list[Tensor], runs: PartRuns, between: Callable[[], None]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.inner, ctx.runs, ctx.between = inner, runs, between
        return tuple(value.detach() for value in inner)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:  # type: ignore[override]
        if ctx.inner is None:
            raise FlashDPError("two backward passes went through one forward: add the losses up and call backward once")
        inner, ctx.inner = ctx.inner, None
        reached = [(value, grad) for value, grad in zip(inner, grads, strict=True) if grad is not None]
        values, tangents = [value for value, _ in reached], [grad for _, grad in reached]
        del inner, reached
        with LEDGER.one_backward():
            ctx.runs.twice(lambda keep: torch.autograd.backward(values, tangents, retain_graph=keep), ctx.between)
        return None, None, None, None
