"""The weight of each sample in the clipped sum, and the count of samples that were dropped."""

import threading

import torch
from torch import Tensor

from flashdp_compile.compat import real_tensors
from flashdp_compile.errors import InternalError
from flashdp_compile.kernels.clip import release_weights_into

__all__ = ["clip_factors", "nonfinite_samples", "prepare", "reset_nonfinite"]

_counters: dict[torch.device, Tensor] = {}
_lock = threading.Lock()


def prepare(device: torch.device | str) -> None:
    """Makes the counter of a device, unless it is there. Must run outside of any CUDA graph capture."""
    with real_tensors(), torch.inference_mode(False), _lock:  # an ordinary tensor, whatever mode is on
        counter = torch.zeros((), dtype=torch.int64, device=device)
        _counters.setdefault(counter.device, counter)


def nonfinite_samples() -> int:
    """How many samples had a gradient norm that was not finite and were left out of a sum, in this process.

    Since the start or the last reset_nonfinite(). Waits for every device. The number is not noised: it reveals a little
    about the samples, so use it to debug and do not publish it. A sample counts once for each backward of a compiled
    graph, in however many clipping groups its norm is not finite.
    """
    return sum(int(counter.item()) for counter in list(_counters.values()))


def reset_nonfinite() -> None:
    """Counts from zero again, on all devices."""
    for counter in list(_counters.values()):
        counter.zero_()


@torch.library.custom_op("flashdp::clip_factors", mutates_args=())
def clip_factors(
    sqnorm: Tensor,
    bound: float,
    fn: str,
    mean: bool,
    expected_batch_size: int | None,
    counts: bool = True,
    others: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Weights [B] float32 from squared gradient norms [B] of the samples' terms in the loss; see kernels/clip.py.

    `mean`: the loss is a mean over the B samples, so a sample's own gradient is B times its term, and the weighted sum
    is divided by expected_batch_size, or by B where that is None (allowed only if B is public). Otherwise the loss is a
    sum, and the result is not divided. `grad_scale` []: the loss was scaled by it; the weighted sum is not, any more.
    A sample whose norm is not finite gets weight 0.

    `counts`: the samples with such a norm, here or in `others` [B, K-1], the squared norms of the other clipping
    groups, are counted on the device. One call of a release counts for all groups, so that a sample counts once.
    """
    counter = _counters.get(sqnorm.device)
    if counter is None:
        if sqnorm.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InternalError(f"clipping.prepare({str(sqnorm.device)!r}) was not called before graph capture")
        prepare(sqnorm.device)
        counter = _counters[sqnorm.device]
    policy = bound, fn, mean, expected_batch_size, grad_scale
    return release_weights_into(counter if counts else None, sqnorm, others, *policy)


@clip_factors.register_fake
def _(
    sqnorm: Tensor,
    bound: float,
    fn: str,
    mean: bool,
    expected_batch_size: int | None,
    counts: bool = True,
    others: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> Tensor:
    return sqnorm.new_empty(sqnorm.shape, dtype=torch.float32)
