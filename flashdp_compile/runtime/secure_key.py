"""Keys of secure noise: 256 bits and a step, int64 [5], that no two draws have in common.

A state is such a tensor on the device that draws. `next_key` copies it and raises the step in place: device operations
at a fixed address, so a replayed CUDA graph draws a new step each time.

Guarantees. A state of `fresh` holds 256 bits from the operating system, and in a forked child it holds others; so does
one of `shared`, whose bits several processes have in common. One of `derived` is a hash: equal arguments replay the
same noise, so it is for tests only. Within one state no step is given twice, and drawing from several threads is safe.

What is up to the caller. A copy of a state gives the same keys as the state. So no state belongs into a checkpoint: a
run that resumes from one would draw the same noise for other samples, and the difference of two releases with equal
noise shows both in the clear. It calls `fresh` again. What was drawn before a fork is known to both sides; a copy of a
state that others made, or one in shared memory, is not renewed in a child.
"""

import hashlib
import os
import threading

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flashdp_compile.compat import real_tensors

__all__ = ["derived", "fresh", "next_key", "shared"]

STEPS = 1 << 62
_DOMAIN = b"flashdp_compile secure noise key, version 1"
_secret = WeakTensorKeyDictionary()  # the states that are to be renewed in a child
_lock = threading.Lock()


def fresh(device: torch.device | str) -> Tensor:
    """A state whose key is 256 bits from the operating system, at step 0."""
    return _remembered(_state(os.urandom(32), device))


def shared(secret: bytes) -> Tensor:
    """The state on the CPU whose key is these 32 bytes, which somebody has drawn for several processes, at step 0."""
    if len(secret) != 32:
        raise ValueError(f"a key has 32 bytes: {len(secret)}")
    return _remembered(_state(secret, "cpu"))


def derived(seed: int, domain: str) -> Tensor:
    """The state on the CPU whose key is a hash of both arguments, at step 0. For replays: it is no secret."""
    return _state(_hash("seed", str(seed).encode(), domain.encode()), "cpu")


def next_key(state: Tensor) -> Tensor:
    """A copy of the state, whose step is then raised. Does not wait for the device.

    RuntimeError, or a failed assertion on a GPU, where the step is not within 0 .. 2^62 - 1.
    """
    with _lock:
        torch.ops.aten._assert_async.msg((state[4] >> 62) == 0, "a key of secure noise has used up its 2^62 steps")
        drawn = state.clone()
        state[4] += 1
    return drawn


def _hash(kind: str, *parts: bytes) -> bytes:
    """SHA-256 of the parts, each after its length, so that no two lists of parts are one text."""
    text = b"".join(len(part).to_bytes(8, "little") + part for part in (_DOMAIN, kind.encode(), *parts))
    return hashlib.sha256(text).digest()


def _state(key: bytes, device: torch.device | str) -> Tensor:
    words = [int.from_bytes(key[n : n + 8], "little", signed=True) for n in range(0, 32, 8)]
    # a compiler may have fake tensors switched on, or the user inference mode: this must be an ordinary tensor
    with real_tensors(), torch.inference_mode(False):
        return torch.tensor([*words, 0], dtype=torch.int64, device="cpu").to(device)


def _remembered(state: Tensor) -> Tensor:
    with _lock:
        _secret[state] = None
    return state


def _after_fork() -> None:
    """A child must not draw what its parent draws. CUDA states are of no use in a child and are left alone."""
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    for state in list(_secret):
        if state.device.type == "cpu":
            state.copy_(_state(os.urandom(32), "cpu"))


os.register_at_fork(after_in_child=_after_fork)
