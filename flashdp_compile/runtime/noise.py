"""Keys of the noise: each backward draws one [key, step], and no pair is ever drawn twice (key_states.py).

Equal seeds replay the same noise on a device, so a seed is for tests only. Reusing a seed for another run, or calling
`reset`, adds the same noise to different gradients, whose difference then shows them in the clear.
"""

import torch
from torch import Tensor

from flashdp_compile.runtime.key_states import KeyStates

__all__ = ["KEYS", "draw_key"]

KEYS = KeyStates("flashdp_compile noise key, version 1")


@torch.library.custom_op("flashdp::draw_key", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_key(anchor: Tensor, seed: int | None) -> Tensor:
    """The next [key, step] of (anchor.device, seed), int64 [2] on that device. `anchor` only ties it to the backward.

    Raises InternalError where the state would have to be made within a CUDA graph capture.
    """
    return KEYS.draw(anchor.device, seed)


@draw_key.register_fake
def _(anchor: Tensor, seed: int | None) -> Tensor:
    return anchor.new_empty((2,), dtype=torch.int64)
