"""Weights of the samples in the clipped sum.

What is released is sum_b weight_b g_b plus noise, where g_b is the gradient as the graph computes it and loss_scale g_b
is the gradient of the sample's own loss. With n = loss_scale sqrt(sqnorm):

    hard        factor = min(1, C / n)
    automatic   factor = C / (n + gamma)      AUTO-S, Bu, Wang, Zha and Karypis, 2022, "Automatic clipping"
    normalize   factor = C / n, and 0 for n = 0
    weight = factor loss_scale / divisor, in float32

Guarantees. factor n <= C for the float32 numbers themselves: C is lowered by 2^-20, which is 16 units of rounding. Of
these 8 lie between C and the weight where every operation rounds to nearest, and 15 at most where a compiler divides to
within 2 units in the last place, as Triton's plain division does. For `hard` the factor is exactly 1 where
n <= C (1 - 2^-19). A sample whose n is not finite (NaN, infinity, or the root of a negative
estimate) has a weight of exactly 0 and is counted.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import cdiv, start
from flashdp_compile.kernels.family import Template

FUNCTIONS = ("hard", "automatic", "normalize")
LOWERED = 1 - 2.0**-20
GAMMA = 0.01
LEAST = 2.0**-120  # of the squared norms that are told apart


def clip_weights(
    sqnorm: Tensor, bound: float, fn: str, loss_scale: float | Tensor, divisor: float | Tensor, gamma: float = GAMMA
) -> tuple[Tensor, Tensor]:
    """Weights [B] float32 and the number of samples dropped [] int64, from squared norms [B]. Plain torch, any device.

    loss_scale and divisor are positive: floats, or tensors of one element. Raises ValueError for a bound that is not
    positive (or infinite, unless fn is "hard"), for a gamma that is negative, and for an unknown fn.
    """
    weights, finite = _weights(sqnorm, bound, fn, loss_scale, divisor, gamma)
    return weights, (~finite).sum()


def _weights(
    sqnorm: Tensor, bound: float, fn: str, loss_scale: float | Tensor, divisor: float | Tensor, gamma: float = GAMMA
) -> tuple[Tensor, Tensor]:
    """The weights, and whether the norm of each sample is finite."""
    check(bound, fn, gamma)
    norm = sqnorm.sqrt() * loss_scale
    bound *= LOWERED
    if fn == "hard":
        factor = (bound / norm).clamp_max(1.0)
    elif fn == "automatic":
        factor = bound / (norm + gamma)
    else:
        factor = torch.where(norm > 0, bound / norm, 0.0)
    finite = norm.isfinite()
    return torch.where(finite, factor * loss_scale / divisor, 0.0).to(torch.float32), finite


def release_weights(
    sqnorm: Tensor,
    bound: float,
    fn: str,
    mean: bool,
    expected_batch_size: int | None,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Weights [B] from the squared norms [B] of the samples' terms in a loss: `flashdp::clip_factors` that counts
    nothing, in plain torch."""
    return _weights(floored(sqnorm), bound, fn, *scales(sqnorm.shape[0], mean, expected_batch_size, grad_scale))[0]


def floored(sqnorm: Tensor) -> Tensor:
    """Squares of elements below 2^-74 are lost in float32: such a norm counts as 2^-60, more than 2^28 of them have.

    A negative estimate is no norm: it becomes NaN, so that the sample is dropped.
    """
    return torch.where(sqnorm < 0, math.nan, sqnorm.clamp_min(LEAST))


def scales(
    batch: int, mean: bool, expected_batch_size: int | None, grad_scale: Tensor | None = None
) -> tuple[float | Tensor, float]:
    """loss_scale and divisor for a loss that is the mean over `batch` samples, or their sum, times `grad_scale` []."""
    batch = max(batch, 1)
    divisor = batch if expected_batch_size is None else expected_batch_size
    loss_scale = float(batch if mean else 1)
    return loss_scale if grad_scale is None else loss_scale / grad_scale, float(divisor if mean else 1)


def clip_weights_into(
    counter: Tensor | None,
    sqnorm: Tensor,
    bound: float,
    fn: str,
    loss_scale: float | Tensor,
    divisor: float | Tensor,
    gamma: float = GAMMA,
) -> Tensor:
    """clip_weights that adds the count to `counter`, one int64 on the same device. One kernel on CUDA, no waiting.

    Without a counter nothing is counted.
    """
    if sqnorm.is_cuda and sqnorm.dtype == torch.float32:
        return launch(counter, sqnorm, bound, fn, loss_scale, divisor, gamma)
    weights, dropped = clip_weights(sqnorm, bound, fn, loss_scale, divisor, gamma)
    if counter is not None:
        counter += dropped
    return weights


def release_weights_into(
    counter: Tensor | None,
    sqnorm: Tensor,
    others: Tensor | None,
    bound: float,
    fn: str,
    mean: bool,
    expected_batch_size: int | None,
    grad_scale: Tensor | None = None,
    *,
    batch: int | None = None,
) -> Tensor:
    """release_weights that adds to `counter` how many samples have no finite norm, here or in `others` [B, K].

    `batch`: the samples of the loss, where these are not all of them.
    """
    scaling = scales(sqnorm.shape[0] if batch is None else batch, mean, expected_batch_size, grad_scale)
    norms = [sqnorm] if others is None else [sqnorm, others]
    if all(n.is_cuda and n.dtype == torch.float32 for n in norms):
        return launch(counter, sqnorm, bound, fn, *scaling, others=others, least=LEAST)
    sqnorm = floored(sqnorm)
    if counter is not None and others is not None:
        counter += (~(sqnorm.isfinite() & floored(others).isfinite().all(1))).sum()
        counter = None
    return clip_weights_into(counter, sqnorm, bound, fn, *scaling)


@dataclass(frozen=True)
class Spec:
    fn: str
    scale_tensor: bool
    divisor_tensor: bool
    counts: bool = True
    others: bool = False  # whose norms count, too
    floors: bool = False
    block: int = 256
    at_once: int = 16  # of the others


# factor(...) of a norm, for a bound that is lowered already. sqrt_rn and div_rn round to nearest, as plain torch does.
MACROS = """\
{%- macro factor(norm, limit, gamma, fn) -%}
{%- if fn == "hard" -%}
tl.where({{ norm }} > {{ limit }}, tl.div_rn({{ limit }}, {{ norm }}), 1.0)
{%- elif fn == "automatic" -%}
tl.div_rn({{ limit }}, {{ norm }} + {{ gamma }})
{%- else -%}
tl.where({{ norm }} > 0.0, tl.div_rn({{ limit }}, {{ norm }}), 0.0)
{%- endif -%}
{%- endmacro -%}
"""

TEMPLATE = Template(
    "clip_weights",
    MACROS
    + """
import triton
import triton.language as tl


@triton.jit
def kernel(
    sqnorm_ptr, sqnorm_s0, bound, gamma, scale_arg, divisor_arg, weight_ptr, counter_ptr, B,
    others_ptr, others_s0, others_s1, K, least,
):
    b = tl.program_id(0) * {{ block }} + tl.arange(0, {{ block }})
    scale = tl.full([{{ block }}], {{ "tl.load(scale_arg)" if scale_tensor else "scale_arg" }}, tl.float32)
    divisor = tl.full([{{ block }}], {{ "tl.load(divisor_arg)" if divisor_tensor else "divisor_arg" }}, tl.float32)
    limit = tl.full([{{ block }}], bound, tl.float32)
    sqnorm = tl.load(sqnorm_ptr + b.to(tl.int64) * sqnorm_s0, mask=b < B, other=0.0)
{% if floors %}
    low = (sqnorm >= 0.0) & (sqnorm < least)  # the root of a negative one is NaN
    sqnorm = tl.where(low, tl.full([{{ block }}], least, tl.float32), sqnorm)
{% endif %}
    norm = tl.sqrt_rn(sqnorm) * scale
    finite = tl.abs(norm) < float("inf")
    factor = {{ factor("norm", "limit", "gamma", fn) }}
    tl.store(weight_ptr + b, tl.where(finite, tl.div_rn(factor * scale, divisor), 0.0), mask=b < B)
{% if counts %}
    bad = finite == 0
{% if others %}
    spoilt = tl.zeros([{{ block }}, {{ at_once }}], tl.int32)
    for first in range(0, K, {{ at_once }}):
        k = first + tl.arange(0, {{ at_once }})
        at = b[:, None].to(tl.int64) * others_s0 + k[None, :].to(tl.int64) * others_s1
        other = tl.load(others_ptr + at, mask=(b < B)[:, None] & (k < K)[None, :], other=0.0)
        spoilt += ((other >= 0.0) & (other < float("inf")) == 0).to(tl.int32)
    bad = bad | (tl.sum(spoilt, 1) > 0)
{% endif %}
    dropped = tl.sum(((b < B) & bad).to(tl.int64))
    if dropped > 0:
        tl.atomic_add(counter_ptr, dropped)
{% endif %}
""",
)


def launch(
    counter: Tensor | None,
    sqnorm: Tensor,
    bound: float,
    fn: str,
    loss_scale: float | Tensor,
    divisor: float | Tensor,
    gamma: float = GAMMA,
    others: Tensor | None = None,
    least: float | None = None,
) -> Tensor:
    """The Triton version of clip_weights_into, for float32 norms; with `others` and `least` of release_weights_into."""
    check(bound, fn, gamma)
    scalars = [s if isinstance(s, Tensor) else float(s) for s in (loss_scale, divisor)]
    tensors = isinstance(loss_scale, Tensor), isinstance(divisor, Tensor)
    spec = Spec(fn, *tensors, counter is not None, others is not None, least is not None)
    (B,) = sqnorm.shape
    weights = sqnorm.new_empty(B)
    unused = weights if counter is None else counter  # a kernel that does not count never touches its counter
    arguments = [sqnorm, sqnorm.stride(0), bound * LOWERED, gamma, *scalars, weights, unused, B]
    arguments += [sqnorm, 0, 0, 0] if others is None else [others, *others.stride(), others.shape[1]]
    arguments.append(0.0 if least is None else least)
    start(kernel(TEMPLATE, spec), cdiv(B, spec.block), sqnorm, *arguments)
    return weights


def check(bound: float, fn: str, gamma: float = GAMMA) -> None:
    if fn not in FUNCTIONS:
        raise ValueError(f"unknown clip function {fn!r}: use one of {', '.join(FUNCTIONS)}")
    if not bound > 0 or (math.isinf(bound) and fn != "hard"):
        raise ValueError(
            f"the clipping bound must be positive, and finite unless fn is 'hard': bound={bound}, fn={fn!r}"
        )
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative: gamma={gamma}")
