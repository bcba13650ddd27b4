"""The gate before every timing: the gradients of the very step that is timed, against a loop over samples.

    expected_k = sum_i c_ik g_ik / B        c_ik = min(1, C_k / |g_ik|), or 1 for a step that is not private

g_i is the gradient of sample i's own loss by plain autograd in float32, one sample at a time. Groups k are one ("flat")
or one for each module that owns parameters ("per_layer"), with C_k = max_grad_norm / sqrt(number of groups). Nothing of
this is shared with flashdp_compile.

A step under autocast may be as far from that as the same loop under the same autocast, and a quarter more: in a deep
model, what 16 bits round away is more than the tolerance. Rounding goes all ways, so along the gradient itself, where a
wrong scale or a missing sample shows, the tolerance stands.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isfinite, sqrt

import torch
from torch import Tensor, nn

from benchmarks.workloads import Batch


class CheckFailed(Exception):
    """A step does not compute what it claims to; it must not be timed."""


@contextmanager
def _full_sums() -> Iterator[None]:
    """Within, matrix products in 16 bits are summed in float32 throughout, and float32 is not rounded to TF32.

    cuBLAS otherwise rounds the partial sums of long products: with a vocabulary of 50257, gradients behind the head
    are off by a tenth.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32
    matmul.allow_bf16_reduced_precision_reduction = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32 = before


@_full_sums()
def expected_gradients(
    model: nn.Module,
    batch: Batch,
    clipping: str | None,
    max_grad_norm: float,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """{parameter name: its gradient, without noise}, in float32. `clipping` None stands for a plain mean.

    Raises:
        CheckFailed: a sample's gradient is not finite, so there is nothing to compare with.
    """
    groups, bound = _groups([name for name, _ in model.named_parameters()], clipping, max_grad_norm)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    size = len(batch[0])
    for i, gradients in enumerate(_of_samples(model, batch, autocast)):
        squares = dict.fromkeys(groups.values(), 0.0)
        for name, gradient in gradients.items():
            squares[groups[name]] += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        if not all(map(isfinite, squares.values())):
            raise CheckFailed(f"the gradient of sample {i} of the reference is not finite")
        for name, gradient in gradients.items():
            norm = sqrt(squares[groups[name]])
            factor = 1.0 if clipping is None or norm <= bound else bound / norm
            total[name].add_(gradient, alpha=factor / size)
    return total


@_full_sums()
def combination(model: nn.Module, batch: Batch, clipping: str, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{parameter: the sum of its samples' gradients that is nearest to `gradients`}, with one factor for every sample
    and clipping group: what a step may release that clips by estimates of norms. All samples' gradients are held."""
    groups, _ = _groups([name for name, _ in model.named_parameters()], clipping, 1.0)
    samples = [{n: g.float() for n, g in own.items()} for own in _of_samples(model, batch, nullcontext)]
    nearest = {}
    for group in dict.fromkeys(groups.values()):
        members = [name for name, own in groups.items() if own == group]

        def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor], members: list[str] = members) -> float:
            return sum(float((one[n].double() * other[n].double()).sum()) for n in members)

        gram = torch.tensor([[inner(one, other) for other in samples] for one in samples], dtype=torch.float64)
        along = torch.tensor([inner(one, gradients) for one in samples], dtype=torch.float64)
        factors = (torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ along).tolist()
        for n in members:
            nearest[n] = sum(factor * own[n] for factor, own in zip(factors, samples, strict=True))
    return nearest


def _of_samples(
    model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager]
) -> Iterator[dict[str, Tensor]]:
    """The gradients of each sample's own loss, by plain autograd, one sample at a time."""
    parameters = dict(model.named_parameters())
    for i in range(len(batch[0])):
        with autocast():
            (loss,) = model(*(part[i : i + 1] for part in batch))
        yield dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def _groups(names: list[str], clipping: str | None, max_grad_norm: float) -> tuple[dict[str, str], float]:
    """{parameter: its clipping group}, and the bound of each group."""
    if clipping == "per_layer":
        groups = {name: name.rpartition(".")[0] for name in names}
    elif clipping in ("flat", None):
        groups = dict.fromkeys(names, "all")
    else:
        raise ValueError(f"clipping={clipping!r} is none of 'flat', 'per_layer', None")
    return groups, max_grad_norm / sqrt(len(set(groups.values())))


SMALL = 1 / 200  # of the whole gradient's norm


def gradient_errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """{parameter: (|actual - expected|, the norm that this is compared with)}.

    That norm is |expected|, but at least SMALL of the whole gradient's: in 16 bits, gradients that nearly cancel (of
    queries and keys at the start of training) are mostly rounding.
    """
    norms = {name: float(torch.linalg.vector_norm(e, dtype=torch.float64)) for name, e in expected.items()}
    floor = SMALL * sqrt(sum(norm**2 for norm in norms.values()))
    return {
        name: (float(torch.linalg.vector_norm(actual[name] - e, dtype=torch.float64)), max(norms[name], floor))
        for name, e in expected.items()
    }


LEEWAY = 1.25  # times the error of plain autograd under autocast: one rounding of many differs from another
CEILING = 5e-2  # of what LEEWAY allows


def check(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rounding: Mapping[str, float],
    tolerance: float,
    plain: Mapping[str, Tensor] | None = None,
) -> tuple[float, str]:
    """The largest relative error of any parameter's gradient, and the parameter.

    `rounding` {parameter: norm} is allowed besides the tolerance, or besides LEEWAY times the error of `plain`, the
    gradients of the loop under autocast, where that is more and at most CEILING.

    Raises:
        CheckFailed: an error is larger than that, or not a number; or what it has along the gradient is larger than the
            tolerance.
    """
    errors = gradient_errors(actual, expected)
    of_plain = gradient_errors(plain or expected, expected)
    for name, (error, norm) in errors.items():
        own, rounded = expected[name].double().flatten(), rounding[name] / norm
        along = abs(float((actual[name].double().flatten() - own) @ own)) / max(float(own.norm()), 1e-300) / norm
        allowed = max(tolerance, min(CEILING, LEEWAY * of_plain[name][0] / norm)) + rounded
        if not error / norm <= allowed or not along <= tolerance + rounded:
            off = f"{error / norm:.2e}, {along:.2e} of it along itself"
            raise CheckFailed(f"the gradient of {name} is off by {off}; allowed: {allowed:.2e}, {tolerance:.2e}")
    return max((error / norm, name) for name, (error, norm) in errors.items())


PREFIX = 64  # elements


def check_noise(noise: Mapping[str, Tensor], deviation: float) -> None:
    """A step without noise, or with less, or with the same for several parameters would be another step.

    Raises:
        CheckFailed: the noise of a parameter has another deviation, or looks like that of another parameter.
    """
    for name, values in noise.items():
        found = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / sqrt(max(1, values.numel()))
        if not 0 < found or not abs(found / deviation - 1) < 0.01 + 5 / sqrt(2 * values.numel()):
            raise CheckFailed(f"the noise of {name} has deviation {found:.3g}, not {deviation:.3g}")
    long = {name: values.flatten()[:PREFIX] for name, values in noise.items() if values.numel() >= PREFIX}
    if len(long) > 1:
        alike = torch.corrcoef(torch.stack(list(long.values())).double()).abs().fill_diagonal_(0)
        if not float(alike.max()) < 6 / sqrt(PREFIX):
            one, other = divmod(int(alike.argmax()), len(long))
            raise CheckFailed(f"the noise of {list(long)[one]} and {list(long)[other]} is alike")
