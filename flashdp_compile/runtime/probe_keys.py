"""Keys of the probes that norms are estimated with: a new one for each release (key_states.py).

The guarantee of an estimate (docs/randomized_clipping.md) asks for probes that are drawn afresh for every release, and
independently of all that came before it and of the data. They need not be secret afterwards: it holds for whoever knows
them. Whoever knows them before could choose samples whose norms they miss, so a seed is for tests only.

All backward passes of one logical batch have the same probes, on all devices, so that its sum does not depend on how it
was cut into micro-batches.
"""

import torch
from torch import Tensor

from flashdp_compile.runtime.key_states import KeyStates

__all__ = ["KEYS", "draw_probe_key"]

KEYS = KeyStates("flashdp_compile probe key, version 1", alike=True)


@torch.library.custom_op("flashdp::draw_probe_key", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_probe_key(anchor: Tensor, seed: int | None, hold: bool) -> Tensor:
    """The next [key, step] of (anchor.device, seed), int64 [2] on that device. With `hold`, the same in every backward
    until `KEYS.advance()`. `anchor` only ties it to the backward."""
    return KEYS.draw(anchor.device, seed, hold)


@draw_probe_key.register_fake
def _(anchor: Tensor, seed: int | None, hold: bool) -> Tensor:
    return anchor.new_empty((2,), dtype=torch.int64)
