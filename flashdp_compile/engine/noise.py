"""The noise of a step, added to sums that lack it: a key for each device, a counter for the steps.

A key that nobody gave lives as long as this object and this process; a run that is resumed has another, so that no
draw is ever repeated, whatever happened between a checkpoint and the end of the process that made it.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, NoReturn

import torch
from torch import Tensor

import flashdp_compile.kernels  # noqa: F401  the ops
from flashdp_compile.errors import InternalError, OptionError
from flashdp_compile.kernels.secure_noise import grid, secure_gaussian
from flashdp_compile.runtime import secure_key

_DOMAIN = "flashdp_compile engine noise 1"
_TRIED = 4099  # normals of the check of a device: several blocks, the last not whole


class SecureNoise:
    """ChaCha20, tails to 11 deviations, sums rounded to a grid: docs/secure-noise.md. With a `seed` a step draws the
    same in every process."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._states: dict[torch.device, Tensor] = {}

    def add(self, total: Tensor, step: int, stream: int, std: float) -> Tensor:
        """`total` with noise of this deviation. No two parameters may have the same stream in a step."""
        key = self._state(total.device).clone()
        key[4] = step
        return torch.ops.flashdp.add_secure_noise(total, key, stream, std)

    def _state(self, device: torch.device) -> Tensor:
        if device not in self._states:
            if device.type != "cpu":
                _try_out(device)
            derived = None if self._seed is None else secure_key.derived(self._seed, f"{_DOMAIN} {device}")
            self._states[device] = secure_key.fresh(device) if derived is None else derived.to(device)
        return self._states[device]


def _try_out(device: torch.device) -> None:
    """Raises InternalError unless the kernel draws on this device what its twin draws on the CPU: wrong noise would be
    seen by nobody."""
    key, std = secure_key.derived(0, "known answer"), 0.75
    found = torch.ops.flashdp.add_secure_noise(torch.zeros(_TRIED, device=device), key.to(device), 3, std)
    expected = std * secure_gaussian(_TRIED, key, 3)
    off = (found.cpu() - expected).abs().max().item()
    if not off <= 0.51 * grid(std):  # half a step of the grid, and rounding
        raise InternalError(f"secure noise on {device} is off by {off / std} deviations from what it should be")


class PhiloxNoise:
    """Philox, as in a compiled backward: faster, and not meant to withstand anyone who tries to predict it."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._keys: dict[torch.device, int] = {}
        self._process = os.getpid()

    def add(self, total: Tensor, step: int, stream: int, std: float) -> Tensor:
        key = torch.tensor([self._key(total.device), step], dtype=torch.int64, device=total.device)
        return torch.ops.flashdp.add_noise(total, key, stream, std)

    def _key(self, device: torch.device) -> int:
        if self._process != os.getpid():  # a child of a fork must not draw what its parent draws
            self._process = os.getpid()
            self._keys.clear()
        if device not in self._keys:
            told = f"{_DOMAIN}\0{device}\0{self._seed}".encode()
            entropy = os.urandom(8) if self._seed is None else hashlib.sha256(told).digest()[:8]
            self._keys[device] = int.from_bytes(entropy, "little", signed=True)
        return self._keys[device]


def _no_copy(self: Any) -> NoReturn:
    raise OptionError("noise cannot be copied: two of them would draw the same")


SecureNoise.__reduce__ = PhiloxNoise.__reduce__ = _no_copy  # type: ignore[method-assign, assignment]
NOISES: dict[str, Any] = {"secure": SecureNoise, "philox": PhiloxNoise}
