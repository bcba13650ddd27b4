"""The noise of a step, added to sums that lack it: a key for each device, a counter for the steps.

A key that nobody gave lives as long as this object and this process; a run that is resumed has another, so that no
draw is ever repeated, whatever happened between a checkpoint and the end of the process that made it.
"""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor

_DOMAIN = b"flashdp_compile engine noise 1"


class StepNoise:
    """Gaussian noise for the parameters of a run. With a `seed` a step draws the same in every process."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._keys: dict[torch.device, int] = {}
        self._process = os.getpid()

    def add(self, total: Tensor, step: int, stream: int, std: float) -> Tensor:
        """`total` with noise of this deviation. No two parameters may have the same stream in a step."""
        key = torch.tensor([self._key(total.device), step], dtype=torch.int64, device=total.device)
        return torch.ops.flashdp.add_noise(total, key, stream, std)

    def _key(self, device: torch.device) -> int:
        if self._process != os.getpid():  # a child of a fork must not draw what its parent draws
            self._process = os.getpid()
            self._keys.clear()
        if device not in self._keys:
            told = b"\0".join((_DOMAIN, str(device).encode(), str(self._seed).encode()))
            entropy = os.urandom(8) if self._seed is None else hashlib.sha256(told).digest()[:8]
            self._keys[device] = int.from_bytes(entropy, "little", signed=True)
        return self._keys[device]
