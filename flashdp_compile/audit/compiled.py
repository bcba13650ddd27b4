"""One step of the user's own model through the backend, without noise, as an oracle needs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from flashdp_compile.audit.neighbours import rows
from flashdp_compile.errors import OptionError
from flashdp_compile.options import Options, first_match

Loss = Callable[[Any, Any], Tensor]
"""(compiled model, batch) -> the losses of the samples [B], or the scalar that backward is called on."""


class CompiledStep:
    """(batch, weights of its samples' losses [B]) -> {parameter: sum of the clipped gradients}, not divided by a batch
    size. It works on a copy of the model. `per_sample`: whether the last loss had one value for each sample; only then
    can they be weighted."""

    def __init__(self, model: nn.Module, loss: Loss, options: Mapping[str, Any]) -> None:
        if options.get("grad_scaler") is not None:
            raise OptionError("grad_scaler is among the options: audit the unscaled loss, and leave it out")
        if options.get("norm", "exact") != "exact":
            raise OptionError(
                f"norm={options['norm']!r} is among the options: norms that are estimated bound a gradient in "
                "distribution, not each one. Audit with norm='exact'"
            )
        settings = {**options, "noise_multiplier": 0.0, "noise_at": "backward"}
        self.options = Options.parse(settings)
        self.model = copy.deepcopy(model)
        self.compiled = torch.compile(self.model, backend="flashdp", fullgraph=True, options=settings)
        self.loss, self.per_sample = loss, False

    def __call__(self, batch: Any, weights: Tensor) -> dict[str, Tensor]:
        for parameter in self.model.parameters():
            parameter.grad = None
        count, losses = rows(batch), self.loss(self.compiled, batch)
        self.per_sample = losses.dim() > 0
        if self.per_sample:
            if losses.shape != (count,):
                raise OptionError(f"loss gives shape {tuple(losses.shape)}; allowed: ({count},), or a scalar")
            weighted = losses * weights.to(losses)
            losses = weighted.mean() if self.options.loss_reduction == "mean" else weighted.sum()
        elif not bool((weights == 1).all()):
            raise OptionError("loss gives a scalar, whose samples have no weights: let it give one loss for each")
        losses.backward()
        divisor = (self.options.expected_batch_size or count) if self.options.loss_reduction == "mean" else 1
        found = ((name, p.grad) for name, p in self.model.named_parameters())
        return {name: grad.detach() * divisor for name, grad in found if grad is not None}


def claimed_bound(options: Options, released: Collection[str]) -> float:
    """C, from the options alone: the root of the sum of the squared bounds of the groups that are released."""
    if not isinstance(options.max_grad_norm, Mapping):
        return options.max_grad_norm
    groups = {_group(name, options.clipping): options.bound_of(name) or 0.0 for name in released}
    return sqrt(sum(bound**2 for bound in groups.values()))


def _group(name: str, clipping: str | Mapping[str, str]) -> str | None:
    return name.rpartition(".")[0] if isinstance(clipping, str) else first_match(clipping, name)
