"""One training step of a case through torch.compile, the loss outside the model or inside it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.case import Batch, Case, LossInside

# where the loss is: outside; inside, one per sample; inside, already their mean or sum
# the reference always runs on a CPU, in float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PLACES = ("outside", "inside", "inside_reduced")


def compiled(
    case: Case, model: nn.Module, place: str, reduction: str, backend: str, options: Mapping[str, Any]
) -> nn.Module:
    """The compiled module: the model, or the model with its loss inside; it shares its parameters with `model`."""
    if place not in PLACES:
        raise ValueError(f"place={place!r} is none of {PLACES}")
    module = model if place == "outside" else LossInside(model, case.loss, "none" if place == "inside" else reduction)
    return torch.compile(module, backend=backend, fullgraph=True, options=dict(options) or None)


def loss_of(case: Case, module: nn.Module, batch: Batch, place: str, reduction: str) -> Tensor:
    """The scalar that is called backward on: the mean or the sum of the losses of the samples."""
    if place == "outside":
        losses = case.losses(module, batch)
    else:
        losses = module(batch.targets, *batch.args, **batch.kwargs)
    return losses if losses.dim() == 0 else getattr(losses, reduction)()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """{fqn: p.grad} of the trainable parameters, on the CPU."""
    return {n: None if p.grad is None else p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}


def compiled_gradients(
    case: Case,
    model: nn.Module,
    batch: Batch,
    place: str = "outside",
    reduction: str = "mean",
    backend: str = "flashdp",
    **options: Any,
) -> dict[str, Tensor | None]:
    """p.grad after one forward and backward of a copy of the model, compiled anew."""
    torch._dynamo.reset()
    model, batch = copy.deepcopy(model).to(DEVICE), batch.on(DEVICE)
    options = {**case.options, **options}
    if case.batch_dim:
        options["batch_dim"] = case.batch_dim
    module = compiled(case, model, place, reduction, backend, options)
    loss_of(case, module, batch, place, reduction).backward()
    return gradients(model)
