"""The noise of a step, added to sums that lack it: one key for all devices and processes, a counter for the steps.

A key that nobody gave lives as long as this object and this process; a run that is resumed has another, so that no
draw is ever repeated, whatever happened between a checkpoint and the end of the process that made it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

import flashdp_compile.kernels  # noqa: F401  the ops
from flashdp_compile.errors import InternalError, OptionError
from flashdp_compile.kernels import gaussian, secure_noise
from flashdp_compile.kernels.noise_table import Entry, NoiseTable, apart, fits
from flashdp_compile.kernels.secure_noise import grid, secure_gaussian
from flashdp_compile.runtime import secure_key

_DOMAIN = "flashdp_compile engine noise 1"
_TRIED = 4099  # normals of the check of a device: several blocks, the last not whole


class Noise:
    """Adds noise that nobody has seen before. Subclasses say from which key it comes, and by which op. `secret` gives
    so many bytes that nobody knows, the same to all processes that make the steps together."""

    secure: ClassVar[bool]
    op: ClassVar[Any]
    reference: ClassVar[Any]  # the op's twin, which may begin with any block
    drawn: ClassVar[int]  # numbers of a block

    def __init__(self, seed: int | None, secret: Callable[[int], bytes] = os.urandom) -> None:
        self._seed = seed
        self._tables: dict[Any, NoiseTable] = {}

    def key(self, device: torch.device, step: int) -> Tensor:
        """Of all draws of a step on a device."""
        raise NotImplementedError

    def add(
        self,
        totals: Sequence[Tensor],
        step: int,
        streams: Sequence[int],
        std: float,
        factors: Tensor | None = None,
        groups: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Each of `totals` with noise of this deviation, times the factor of its group, if there are any, wherever they
        are kept. Memory may be that of `totals`. No two tensors may have the same stream in a step. A deviation of 0
        adds nothing. `offsets`: how many elements of a larger tensor lie before each, whose noise has the stream."""
        if offsets is not None and std > 0 and any(first % self.drawn for first in offsets):
            return self._beside(totals, step, streams, std, factors, groups, offsets)
        added = list(totals)
        on = {device: None if factors is None else factors.to(device) for device in {t.device for t in totals}}
        which = [0] * len(added) if groups is None else groups
        blocks = [0] * len(added) if offsets is None else [first // self.drawn for first in offsets]
        alone, together = list[int](), dict[torch.device, list[int]]()
        for at, total in enumerate(added):
            fitting = std > 0 and total.is_cuda and fits(total)
            (together.setdefault(total.device, []) if fitting else alone).append(at)
        for device, places in together.items():
            own = [added[at] for at in places]
            if not apart(own):
                alone += places
                continue
            told = tuple(Entry(added[at].numel(), streams[at], which[at], blocks[at]) for at in places)
            if told not in self._tables:
                self._tables[told] = NoiseTable(told, self.secure)
            self._tables[told].add(own, self.key(device, step), std, on[device])
        for at in alone:
            total = added[at]
            if std > 0:
                key = self.key(total.device, step)
                op = self.op if blocks[at] == 0 else functools.partial(self.reference, block=blocks[at])
                total = op(total, key, streams[at], std)
            scale = on[total.device]
            added[at] = total if scale is None else total * scale[which[at]]
        return added

    def _beside(
        self,
        totals: Sequence[Tensor],
        step: int,
        streams: Sequence[int],
        std: float,
        factors: Tensor | None,
        groups: Sequence[int] | None,
        offsets: Sequence[int],
    ) -> list[Tensor]:
        """`add` where a shard begins within a block of noise: behind zeros that complete the block."""
        before = [first % self.drawn for first in offsets]
        whole = [
            torch.cat([total.new_zeros(n), total.flatten()]) if n else total
            for total, n in zip(totals, before, strict=True)
        ]
        firsts = [first - n for first, n in zip(offsets, before, strict=True)]
        added = self.add(whole, step, streams, std, factors, groups, firsts)
        return [one[n:].view(total.shape) if n else one for one, total, n in zip(added, totals, before, strict=True)]


class SecureNoise(Noise):
    """ChaCha20, tails to 11 deviations, sums rounded to a grid: docs/secure-noise.md. With a `seed` a step draws the
    same in every process."""

    secure, op = True, staticmethod(torch.ops.flashdp.add_secure_noise)
    reference, drawn = staticmethod(secure_noise.reference), secure_noise.EACH

    def __init__(self, seed: int | None, secret: Callable[[int], bytes] = os.urandom) -> None:
        super().__init__(seed)
        self._key = secure_key.shared(secret(32)) if seed is None else secure_key.derived(seed, _DOMAIN)
        self._states: dict[torch.device, Tensor] = {torch.device("cpu"): self._key}

    def key(self, device: torch.device, step: int) -> Tensor:
        if device not in self._states:
            _try_out(device)
            self._states[device] = self._key.to(device)
        key = self._states[device].clone()
        key[4:].fill_(step)  # unlike an assignment, it does not wait for the device
        return key


def _try_out(device: torch.device) -> None:
    """Raises InternalError unless the kernel draws on this device what its twin draws on the CPU: wrong noise would be
    seen by nobody."""
    key, std = secure_key.derived(0, "known answer"), 0.75
    expected = std * secure_gaussian(_TRIED, key, 3)
    alone = torch.ops.flashdp.add_secure_noise(torch.zeros(_TRIED, device=device), key.to(device), 3, std)
    tabled = torch.zeros(_TRIED, device=device)
    if fits(tabled):
        NoiseTable([Entry(_TRIED, 3)], secure=True).add([tabled], key.to(device), std)
    for found in (alone, tabled):
        off = (found.cpu() - expected).abs().max().item()
        if not off <= 0.51 * grid(std):  # half a step of the grid, and rounding
            raise InternalError(f"secure noise on {device} is off by {off / std} deviations from what it should be")


class PhiloxNoise(Noise):
    """Philox, as in a compiled backward: faster, and not meant to withstand anyone who tries to predict it."""

    secure, op = False, staticmethod(torch.ops.flashdp.add_noise)
    reference, drawn = staticmethod(gaussian.reference), 4

    def __init__(self, seed: int | None, secret: Callable[[int], bytes] = os.urandom) -> None:
        super().__init__(seed)
        told = f"{_DOMAIN}\0{seed}".encode()
        self._key = secret(8) if seed is None else hashlib.sha256(told).digest()[:8]
        self._process = os.getpid()

    def key(self, device: torch.device, step: int) -> Tensor:
        if self._process != os.getpid():  # a child of a fork must not draw what its parent draws
            self._process = os.getpid()
            self._key = os.urandom(8) if self._seed is None else self._key
        key = int.from_bytes(self._key, "little", signed=True)
        return torch.tensor([key, step], dtype=torch.int64).to(device, non_blocking=True)


def _no_copy(self: Any) -> NoReturn:
    raise OptionError("noise cannot be copied: two of them would draw the same")


Noise.__reduce__ = _no_copy  # type: ignore[method-assign, assignment]
NOISES: dict[str, type[Noise]] = {"secure": SecureNoise, "philox": PhiloxNoise}
