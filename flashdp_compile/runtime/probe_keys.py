"""Keys of the probes that norms are estimated with: a new one for each release (key_states.py).

The guarantee of an estimate (docs/randomized_clipping.md) asks for probes that are drawn afresh for every release, and
independently of all that came before it and of the data. They need not be secret afterwards: it holds for whoever knows
them. Whoever knows them before could choose samples whose norms they miss, so a seed is for tests only.

It also asks that a sample's weight does not depend on which others take part. Where micro-batches are cut does, so all
backward passes of one logical batch must have the same probes, on all devices; an engine keeps them until its step, and
refuses a step whose passes had others.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.compat import real_tensors
from flashdp_compile.errors import Refusal
from flashdp_compile.runtime.key_states import KeyStates

__all__ = ["KEYS", "HeldProbes", "draw_probe_key"]

DOMAIN = "flashdp_compile probe key, version 1"
KEYS = KeyStates(DOMAIN)  # of releases that are a single backward
_known: list[HeldProbes] = []


class HeldProbes:
    """The probes of the logical batches of one engine, and what its accountant was told of them: by which `norm`, from
    how many `probes`, in how many clipping `groups`. Compiled code knows it by its `place`. `moves` counts the releases
    that have used them up. `entropy`: 16 bytes that all processes have which share the logical batches. `part`: the
    number of the part of a model whose backward runs. Each has probes of its own, though parts of one class share their
    code, and so the streams of their probes."""

    def __init__(
        self, norm: str, probes: int, groups: int, seed: int | None = None, entropy: bytes | None = None
    ) -> None:
        self.norm, self.probes, self.groups, self.moves = norm, probes, groups, 0
        self.place, self._seed = len(_known), seed
        self.part: int | None = None
        self.keys = KeyStates(DOMAIN, alike=True, entropy=entropy)
        _known.append(self)

    def key(self, device: torch.device) -> Tensor:
        """The present [key, step], int64 [2], of the part that runs."""
        drawn = self.keys.draw(device, self._seed, hold=True)
        return drawn if self.part is None else drawn.bitwise_xor_(_turned(self.part, device))

    def prepare(self, device: torch.device) -> None:
        """To be called before any CUDA graph capture."""
        self.keys.prepare(device, self._seed)

    def check(self, groups: Collection[str]) -> None:
        """Raises Refusal unless a graph has as many clipping groups as the accountant was told."""
        if len(groups) != self.groups:
            raise Refusal(
                f"epsilon was computed for norms that are estimated in {self.groups} clipping group(s), and this step "
                f"has {len(groups)}: {', '.join([*groups][:5])}... Give the engine groups={len(groups)}"
            )

    def told(self) -> Any:
        """All that can change a graph, as JSON takes it."""
        return [self.place, self.groups]

    def begin(self, part: int | None) -> None:
        """A backward begins, of a whole model (None) or of a part."""
        self.part = part

    def move(self) -> None:
        """The present ones are used up."""
        self.moves += 1
        self.keys.advance()


@functools.cache
def _turned(part: int, device: torch.device) -> Tensor:
    """What makes the key of a part of that of the whole, int64 [2]: the step stays what it is."""
    digest = hashlib.sha256(f"{DOMAIN}, part {part}".encode()).digest()
    with real_tensors(), torch.inference_mode(False):
        return torch.tensor([int.from_bytes(digest[:8], "little", signed=True), 0], device=device)


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
