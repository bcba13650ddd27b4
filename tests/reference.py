"""The oracle: clipped gradients by a loop over samples, one at a time, through plain eager autograd in float64.

    released_k = sum_i c_ik g_ik / L        for the parameters of group k, without noise

g_ik is the gradient of sample i's own loss, |g_ik| its norm over all parameters of group k together, and

    hard       c = min(1, C_k / |g|)
    automatic  c = C_k / (|g| + 0.01)
    normalize  c = C_k / |g|, and 0 where |g| is 0

A sample whose norm in group k is not finite adds exactly zero to group k. Under `mean` L is `expected_batch_size`, or
the batch's own size; under `sum` nothing is divided.

Groups: `flat` is one; `per_layer` puts together the parameters that one module owns directly, where a tied parameter
belongs to the first owner in the order of `named_parameters`; a mapping {fnmatch pattern: group} takes the first
pattern that matches. K counts the groups of which this step releases a gradient, noise included, and each bound is
max_grad_norm / sqrt(K). A mapping {pattern: bound} as `max_grad_norm` bounds each group by itself instead.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt

import torch
from torch import Tensor, nn

from zoo import Batch, Case
from zoo.case import as_float

Clipping = str | Mapping[str, str]
Bound = float | Mapping[str, float]
GAMMA = 0.01  # of automatic clipping


@dataclass(frozen=True)
class Released:
    """gradients {fqn: tensor}, norms and factors [B, K] with one column per name in `groups`, bounds [K]."""

    gradients: dict[str, Tensor]
    norms: Tensor
    factors: Tensor
    groups: tuple[str, ...]
    bounds: Tensor


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; a tied one appears once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another precision, in place; `nn.Module.to` would make complex buffers real."""
    return model._apply(lambda t: t.to(dtype.to_complex()) if t.is_complex() else as_float(dtype)(t))


def per_sample_gradients(
    case: Case, model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """{fqn: [B, *shape]}, sample by sample on a copy of the model; zeros for a parameter that is not used."""
    model = in_precision(copy.deepcopy(model), dtype)
    batch = batch.to(dtype)
    parameters = trainable(model)
    gradients = {name: p.new_zeros(batch.size, *p.shape) for name, p in parameters.items()}
    for i in range(batch.size):
        losses = case.losses(model, batch.sample(i))
        if losses.shape != (1,):
            raise AssertionError(f"{case.name}: one sample gives losses of shape {tuple(losses.shape)}")
        found = torch.autograd.grad(losses[0], list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[name][i] = gradient
    return gradients


def gradients_one_by_one(model: nn.Module, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """{fqn: [B, *shape]}: the gradient of each loss, a scalar of one sample, as plain autograd gives it."""
    parameters = dict(model.named_parameters())
    found = [torch.autograd.grad(loss, list(parameters.values())) for loss in losses]
    return {name: torch.stack(own) for name, own in zip(parameters, zip(*found, strict=True), strict=True)}


def groups_of(names: list[str], clipping: Clipping) -> dict[str, str]:
    """{fqn: group} for every trainable parameter."""
    if clipping == "flat":
        return dict.fromkeys(names, "flat")
    if clipping == "per_layer":
        return {name: name.rpartition(".")[0] for name in names}
    if isinstance(clipping, str):
        raise ValueError(f"clipping={clipping!r} is none of 'flat', 'per_layer' and a mapping")
    return {name: first_match(name, clipping) for name in names}


def first_match(name: str, patterns: Mapping):
    """The value of the first pattern that matches the name."""
    for pattern, value in patterns.items():
        if fnmatchcase(name, pattern):
            return value
    raise ValueError(f"no pattern of {list(patterns)} matches {name}")


def bounds_of(
    group_of: dict[str, str], groups: tuple[str, ...], max_grad_norm: Bound, released: Collection[str]
) -> list[float]:
    """C_k for every group; nothing is clipped in a group without a released parameter, so its bound is of no matter."""
    if not isinstance(max_grad_norm, Mapping):
        return [max_grad_norm / sqrt(max(1, len({group_of[name] for name in released})))] * len(groups)
    bounds = []
    for group in groups:
        found = {first_match(name, max_grad_norm) for name, its in group_of.items() if its == group}
        if len(found) != 1:
            raise ValueError(f"the parameters of group {group!r} have several bounds: {sorted(found)}")
        bounds.append(found.pop())
    return bounds


def clip_factors(norms: Tensor, bounds: Tensor, clip_fn: str) -> Tensor:
    """[B, K], [K] -> [B, K]."""
    if clip_fn == "hard":
        factors = (bounds / norms).clamp(max=1.0)
    elif clip_fn == "automatic":
        factors = bounds / (norms + GAMMA)
    elif clip_fn == "normalize":
        factors = torch.where(norms == 0, 0.0, bounds / norms)
    else:
        raise ValueError(f"clip_fn={clip_fn!r} is none of 'hard', 'automatic', 'normalize'")
    return torch.where(norms.isfinite(), factors, 0.0)


def release(
    gradients: dict[str, Tensor],
    *,
    clipping: Clipping = "flat",
    max_grad_norm: Bound = 1.0,
    clip_fn: str = "hard",
    loss_reduction: str = "mean",
    expected_batch_size: int | None = None,
    released: Collection[str] | None = None,
) -> Released:
    """Clips and sums per-sample gradients {fqn: [B, *shape]}; `released` names the parameters that get one, or all."""
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction={loss_reduction!r} is neither 'mean' nor 'sum'")
    first = next(iter(gradients.values()))
    size = first.shape[0]
    group_of = groups_of(list(gradients), clipping)
    groups = tuple(dict.fromkeys(group_of.values()))
    squares = first.new_zeros(size, len(groups))
    for name, gradient in gradients.items():
        squares[:, groups.index(group_of[name])] += gradient.reshape(size, gradient[:1].numel()).square().sum(1)
    norms = squares.sqrt()
    bounds = first.new_tensor(bounds_of(group_of, groups, max_grad_norm, gradients if released is None else released))
    factors = clip_factors(norms, bounds, clip_fn)

    divisor = 1 if loss_reduction == "sum" else expected_batch_size or max(size, 1)
    sums = {}
    for name, gradient in gradients.items():
        weights = factors[:, groups.index(group_of[name])].reshape(size, *[1] * (gradient.dim() - 1))
        # 0 * nan is nan: a sample of weight zero is left out, not multiplied away
        sums[name] = torch.where(weights == 0, 0.0, weights * gradient).sum(0) / divisor
    return Released(sums, norms, factors, groups, bounds)


def reference_gradients(case: Case, model: nn.Module, batch: Batch, **options) -> Released:
    """What p.grad of every trainable parameter must be after one backward with noise off; `options` as in `release`."""
    return release(per_sample_gradients(case, model, batch), **options)


def relative_errors(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """{fqn: |actual - expected| / |expected|} in float64, where None counts as zeros.

    A gradient that is zero in exact arithmetic (the bias of attention keys, of a layer before a centring) is rounding
    noise in any precision: below 1e-8 of the whole gradient's norm, that norm is the scale instead.
    """
    total = sqrt(sum(float(tensor.square().sum()) for tensor in expected.values()))
    errors = {}
    for name, tensor in expected.items():
        got = actual.get(name)
        difference = tensor if got is None else got.detach().to("cpu", torch.float64) - tensor
        norm = float(tensor.norm())
        scale = norm if norm > 1e-8 * total else total
        error = float(difference.norm())
        errors[name] = error / scale if scale else error
    return errors


def bound_between(norms: Tensor) -> float:
    """A max_grad_norm that clips some samples and not others, in some groups (all of them at B=1); norms [B, K]."""
    finite = norms[norms.isfinite()]
    finite = finite[finite > 1e-8 * finite.max()] if finite.numel() else finite  # zero but for rounding
    middle = float(finite.median()) if finite.numel() else 1.0
    return (0.5 if norms.shape[0] == 1 else 1.001) * middle * sqrt(norms.shape[1])


def bf16_rounded(model: nn.Module) -> nn.Module:
    """The model with every parameter rounded to bfloat16 in place, dtype unchanged."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(as_float(torch.bfloat16)(parameter))
    return model
