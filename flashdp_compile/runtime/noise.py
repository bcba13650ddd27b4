"""Keys of the noise: each backward draws one [key, step], and no pair is ever drawn twice.

The state of a (device, seed) is an int64 tensor [key, step] on that device. Drawing copies it and raises the step in
place: two device operations at a fixed address, so a replayed CUDA graph draws a new pair each time.

Guarantees. Without a seed, key and first step are 126 bits from the operating system, drawn again in a forked child.
With a seed, both are a hash of seed and device: equal seeds replay the same noise, so a seed is for tests only. Reusing
a seed for another run, or calling `reset`, adds the same noise to different gradients, whose difference then shows them
in the clear. Drawing on one device from two streams at a time is not ordered and not supported.
"""

import hashlib
import os
import threading

import torch
from torch import Tensor

from flashdp_compile.compat import real_tensors
from flashdp_compile.errors import InternalError

__all__ = ["draw_key", "prepare", "reset"]

_DOMAIN = b"flashdp_compile noise key, version 1"
_states: dict[tuple[torch.device, int | None], Tensor] = {}
_lock = threading.Lock()


def prepare(device: torch.device | str, seed: int | None) -> None:
    """Makes the state of (device, seed), unless it is there already: then it goes on where it is.

    Must run before the first draw, outside of any CUDA graph capture. `seed` is any integer of 64 bits, or None.
    """
    # a compiler may have fake tensors switched on, or the user inference mode: this must be an ordinary tensor
    with real_tensors(), torch.inference_mode(False), _lock:
        place = torch.empty(0, device=device).device  # as tensors name it: "cuda" becomes "cuda:0" or what is current
        if (place, seed) not in _states:
            _states[place, seed] = _fresh(place, seed).to(place)


def reset() -> None:
    """Starts every seeded state again and draws new keys for the others. For tests: see the guarantees above.

    In place, as compiled code and captured CUDA graphs refer to the tensors.
    """
    with _lock:
        for (device, seed), state in _states.items():
            state.copy_(_fresh(device, seed))


@torch.library.custom_op("flashdp::draw_key", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_key(anchor: Tensor, seed: int | None) -> Tensor:
    """The next [key, step] of (anchor.device, seed), int64 [2] on that device. `anchor` only ties it to the backward.

    Raises InternalError where the state would have to be made within a CUDA graph capture.
    """
    state = _states.get((anchor.device, seed))
    if state is None:
        if anchor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InternalError(f"noise.prepare({str(anchor.device)!r}, {seed}) was not called before graph capture")
        prepare(anchor.device, seed)
        state = _states[anchor.device, seed]
    with _lock:
        drawn = state.clone()
        state[1] += 1
    return drawn


@draw_key.register_fake
def _(anchor: Tensor, seed: int | None) -> Tensor:
    return anchor.new_empty((2,), dtype=torch.int64)


def _fresh(device: torch.device, seed: int | None) -> Tensor:
    """[key, first step]: the key any 64 bits, the step below 2^62, so that it never overflows."""
    if seed is None:
        entropy = os.urandom(16)
    else:
        entropy = hashlib.sha256(b"\0".join((_DOMAIN, str(device).encode(), str(seed).encode()))).digest()[:16]
    key = int.from_bytes(entropy[:8], "little", signed=True)
    step = int.from_bytes(entropy[8:], "little") >> 2
    return torch.tensor([key, step], dtype=torch.int64, device="cpu")


def _after_fork() -> None:
    """A child must not draw what its parent draws. CUDA states are of no use in a child and are left alone."""
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    for (device, seed), state in _states.items():
        if seed is None and device.type == "cpu":
            state.copy_(_fresh(device, seed))


os.register_at_fork(after_in_child=_after_fork)
