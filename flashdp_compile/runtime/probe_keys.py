"""Keys of the probes that norms are estimated with: a new one for each release (key_states.py).

The guarantee of an estimate (docs/randomized_clipping.md) asks for probes that are drawn afresh for every release, and
independently of all that came before it and of the data. They need not be secret afterwards: it holds for whoever knows
them. Whoever knows them before could choose samples whose norms they miss, so a seed is for tests only.

It also asks that a sample's weight does not depend on which others take part. Where micro-batches are cut does, so all
backward passes of one logical batch must have the same probes, on all devices; an engine keeps them until its step, and
refuses a step whose passes had others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashdp_compile.runtime.key_states import KeyStates

__all__ = ["KEYS", "HeldProbes", "draw_probe_key"]

DOMAIN = "flashdp_compile probe key, version 1"
KEYS = KeyStates(DOMAIN)  # of releases that are a single backward
_known: list[HeldProbes] = []


class HeldProbes:
    """The probes of the logical batches of one engine, and what its accountant was told of them: by which `norm`, from
    how many `probes`, in how many clipping `groups`. Compiled code knows it by its `place`. `moves` counts the releases
    that have used them up. `entropy`: 16 bytes that all processes have which share the logical batches."""

    def __init__(
        self, norm: str, probes: int, groups: int, seed: int | None = None, entropy: bytes | None = None
    ) -> None:
        self.norm, self.probes, self.groups, self.moves = norm, probes, groups, 0
        self.place, self._seed = len(_known), seed
        self.keys = KeyStates(DOMAIN, alike=True, entropy=entropy)
        _known.append(self)

    def key(self, device: torch.device) -> Tensor:
        """The present [key, step], int64 [2]."""
        return self.keys.draw(device, self._seed, hold=True)

    def prepare(self, device: torch.device) -> None:
        """To be called before any CUDA graph capture."""
        self.keys.prepare(device, self._seed)

    def move(self) -> None:
        """The present ones are used up."""
        self.moves += 1
        self.keys.advance()


@torch.library.custom_op("flashdp::draw_probe_key", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_probe_key(anchor: Tensor, seed: int | None, place: int | None) -> Tensor:
    """The next [key, step] of (anchor.device, seed), int64 [2] on that device; or the present one of the `HeldProbes`
    at a place. `anchor` only ties it to the backward."""
    if place is not None:
        return _known[place].key(anchor.device)
    return KEYS.draw(anchor.device, seed)


@draw_probe_key.register_fake
def _(anchor: Tensor, seed: int | None, place: int | None) -> Tensor:
    return anchor.new_empty((2,), dtype=torch.int64)
