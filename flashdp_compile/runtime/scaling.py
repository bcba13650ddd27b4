"""The scale of a loss that a `torch.amp.GradScaler` has scaled, at the time of a backward.

Compiled code knows a scaler by its place in a list of this process, which is part of the compile cache's key, and looks
it up at every backward. So a graph that another process compiled scales by whatever has that place in this one.
"""

import torch
from torch import Tensor

from flashdp_compile.compat import scale_of
from flashdp_compile.errors import UnprotectedGradientError

__all__ = ["grad_scale", "place"]

_scalers: list[torch.amp.GradScaler] = []


def place(scaler: torch.amp.GradScaler) -> int:
    """The number by which compiled code knows this scaler, always the same one."""
    for number, known in enumerate(_scalers):
        if known is scaler:
            return number
    _scalers.append(scaler)
    return len(_scalers) - 1


@torch.library.custom_op("flashdp::grad_scale", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def grad_scale(anchor: Tensor, scaler: int) -> Tensor:
    """The present scale, float32 [] on the device of `anchor`, which only ties it to the backward.

    Raises UnprotectedGradientError if that scaler has never scaled a loss.
    """
    scale = scale_of(_scalers[scaler])
    if scale is None:
        raise UnprotectedGradientError(
            "backward was called on a loss that options={'grad_scaler': scaler} has not scaled. Call "
            "scaler.scale(loss).backward(), or leave the option out. Nothing was released."
        )
    return scale.to(device=anchor.device, dtype=torch.float32, copy=True)


@grad_scale.register_fake
def _(anchor: Tensor, scaler: int) -> Tensor:
    return anchor.new_empty((), dtype=torch.float32)
