"""Keys of counter-based random numbers: pairs [key, step], of which no two draws have one in common.

The state of a (device, seed) is an int64 tensor [key, step] on that device. Drawing copies it and raises the step in
place: two device operations at a fixed address, so a replayed CUDA graph draws a new pair each time.

Without a seed, key and first step are 126 bits from the operating system, drawn again in a forked child. With a seed,
both are a hash of it. Drawing on one device from two streams at a time is not ordered and not supported.
"""

import hashlib
import os
import threading
import weakref

import torch
from torch import Tensor

from flashdp_compile.compat import real_tensors
from flashdp_compile.errors import InternalError

__all__ = ["KeyStates"]


class KeyStates:
    """The states for one purpose. `domain` names it, so that equal seeds give different keys to different purposes;
    `alike`: all devices have the same keys, with a seed or without, as long as they are held and advanced together;
    then `entropy` are the 16 bytes behind keys without a seed, for processes that are to have the same."""

    def __init__(self, domain: str, alike: bool = False, entropy: bytes | None = None) -> None:
        self._domain, self._alike = domain.encode(), alike
        self.states: dict[tuple[torch.device, int | None], Tensor] = {}
        self._advanced, self._entropy = 0, os.urandom(16) if entropy is None else entropy
        self._lock = threading.Lock()
        _known.add(self)

    def prepare(self, device: torch.device | str, seed: int | None) -> None:
        """Makes the state of (device, seed), unless it is there already: then it goes on where it is.

        Must run before the first draw, outside of any CUDA graph capture. `seed` is any integer of 64 bits, or None.
        """
        # a compiler may have fake tensors switched on, or the user inference mode: this must be an ordinary tensor
        with real_tensors(), torch.inference_mode(False), self._lock:
            place = torch.empty(0, device=device).device  # as tensors name it: "cuda" becomes "cuda:0" or the current
            if (place, seed) not in self.states:
                state = self.fresh(place, seed)
                state[1] += self._advanced
                self.states[place, seed] = state.to(place)

    def draw(self, device: torch.device, seed: int | None, hold: bool = False) -> Tensor:
        """The next [key, step], int64 [2]; with `hold` the same again until `advance`.

        Raises InternalError where the state would have to be made within a CUDA graph capture.
        """
        state = self.states.get((device, seed))
        if state is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise InternalError(f"no key was prepared for ({str(device)!r}, {seed}) before graph capture")
            self.prepare(device, seed)
            state = self.states[device, seed]
        with self._lock:
            drawn = state.clone()
            if not hold:
                state[1] += 1
        return drawn

    def advance(self) -> None:
        """Lets all states go on, those whose keys are held as well."""
        with self._lock:
            self._advanced += 1
            for state in self.states.values():
                state[1] += 1

    def reset(self) -> None:
        """Starts every seeded state again and draws new keys for the others. For tests.

        In place, as compiled code and captured CUDA graphs refer to the tensors.
        """
        with self._lock:
            self._advanced, self._entropy = 0, os.urandom(16)
            for (device, seed), state in self.states.items():
                state.copy_(self.fresh(device, seed))

    def fresh(self, device: torch.device, seed: int | None) -> Tensor:
        """[key, first step]: the key any 64 bits, the step below 2^62, so that it never overflows."""
        if seed is None:
            entropy = self._entropy if self._alike else os.urandom(16)
        else:
            parts = (self._domain, *([] if self._alike else [str(device).encode()]), str(seed).encode())
            entropy = hashlib.sha256(b"\0".join(parts)).digest()[:16]
        key = int.from_bytes(entropy[:8], "little", signed=True)
        step = int.from_bytes(entropy[8:], "little") >> 2
        return torch.tensor([key, step], dtype=torch.int64, device="cpu")

    def after_fork(self) -> None:
        """A child must not draw what its parent draws. CUDA states are of no use in a child and are left alone."""
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._entropy = os.urandom(16)
        for (device, seed), state in self.states.items():
            if seed is None and device.type == "cpu":
                state.copy_(self.fresh(device, seed))
                state[1] += self._advanced


_known: weakref.WeakSet[KeyStates] = weakref.WeakSet()


def _after_fork() -> None:
    for states in _known:
        states.after_fork()


os.register_at_fork(after_in_child=_after_fork)
