"""Clipping bounds that move from step to step: how far each is from the one that was compiled, and who lies within.

A group of parameters whose bound is C_k was compiled for it. While its scale is rho_k, a backward clips g / rho_k to
C_k, which is g clipped to rho_k C_k, over rho_k (under clip_fn "automatic" with rho_k gamma in the place of gamma). So
what one sample adds to the sums never exceeds what was compiled, whatever the scales are; whoever adds noise to it
multiplies by rho_k afterwards.

Compiled code knows the scales of a run by their place in a list of this process, as it knows scalers (scaling.py).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashdp_compile.compat import real_tensors
from flashdp_compile.errors import Refusal

__all__ = ["BoundScales", "bound_scales", "count_within"]

FAR = 2.0**60  # scales stay between this and its inverse
NOTHING = 2.0**-30  # a norm below so small a part of its bound is that of no sample, but of padding

_known: list[BoundScales] = []


class Moved(NamedTuple):
    """What a backward had of moving bounds: votes and scales, each [K]; and how often the scales had moved before."""

    votes: Tensor
    scales: Tensor
    moves: int


class BoundScales:
    """The scales rho [K] of the clipping groups of a model, on its device, once it is compiled.

    `groups` are their names and compiled bounds. `within` [K] is of the last backward: half a sample for each that has
    a norm within its bound, less half a sample for each whose norm is beyond it. So one sample moves it by 1/2 in each
    group, whether it is there or not.
    """

    def __init__(self) -> None:
        self.place = len(_known)
        _known.append(self)
        self.groups: dict[str, float] = {}
        self.scales = self.within = self.bounds = torch.ones(0)
        self.moves = 0
        self._first: list[float] = [1.0]
        self._group_of: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._numbers: dict[int, int] = {}

    def prepare(self, groups: Mapping[str, float], members: Sequence[Sequence[Tensor]]) -> None:
        """Makes the scales, all 1 or as they were loaded, unless they are there. `groups` are the names and bounds of
        the clipping groups, `members` the parameters of each.

        Raises Refusal for a model with other groups, and for one on several devices, or on another one.
        """
        devices = {p.device for group in members for p in group}
        if len(devices) > 1:
            raise Refusal(
                f"the parameters are on {', '.join(sorted(map(str, devices)))}: bounds that move are kept on one device"
            )
        if self.groups and {self.scales.device} != devices:
            raise Refusal(
                f"the parameters are on {devices.pop()}, and bounds that move are kept on {self.scales.device}, where "
                "the model was compiled first"
            )
        if self.groups and self.groups != dict(groups):
            raise Refusal(
                "a second model, or the same one with other trainable parameters, is compiled for the moving bounds of "
                f"the first. Its clipping groups are {', '.join(groups)}; those of the first were "
                f"{', '.join(self.groups)}. Give each model an engine of its own"
            )
        order = {name: number for number, name in enumerate(self.groups or groups)}
        for name, group in zip(groups, members, strict=True):
            for parameter in group:
                self._group_of[id(parameter)], self._numbers[id(parameter)] = parameter, order[name]
        if self.groups:
            return
        self.groups = dict(groups)
        with real_tensors(), torch.inference_mode(False):  # ordinary tensors, whatever mode is on
            self.scales = torch.ones(len(groups), dtype=torch.float32, device=devices.pop())
            self.within = torch.zeros_like(self.scales)
            self.bounds = torch.tensor([*groups.values()]).to(self.scales)
            self.load(self._first)

    def load(self, scales: Sequence[float]) -> None:
        """Takes these, or the same one for all groups, now or as soon as the model is compiled.

        Raises Refusal unless there is one, or one for each group.
        """
        self._first = list(scales)
        if not self.groups:
            return
        if len(scales) not in (1, len(self.groups)):  # one for all is where every run begins
            raise Refusal(
                f"the run that is resumed had {len(scales)} clipping groups, and this model has {len(self.groups)}: "
                "its bounds were those of another model"
            )
        if len(scales) == 1:
            self.scales.fill_(scales[0])  # without waiting for the device: a schedule does so at every step
        else:
            self.scales.copy_(torch.tensor(self._first))
        self.moves += 1
        self.forget()

    def move(self, factors: Tensor) -> None:
        """Multiplies the scales by these [K]."""
        self.scales.mul_(factors).clamp_(1 / FAR, FAR)
        self.moves += 1

    def take(self) -> Moved:
        """What the backward had that has just run. There are no votes from then on: one over no samples counts none."""
        taken = Moved(self.within.clone(), self.scales.clone(), self.moves)
        self.forget()
        return taken

    def forget(self) -> None:
        """Drops the votes of a backward that has failed."""
        self.within.zero_()

    def saved(self) -> list[float]:
        """For `load`."""
        return list(self.scales.tolist()) if self.groups else self._first

    def group_of(self, parameter: Tensor) -> int | None:
        """The number of a parameter's group; None for one that was not compiled."""
        if len(self.groups) == 1:
            return 0
        return self._numbers[id(parameter)] if self._group_of.get(id(parameter)) is parameter else None


@torch.library.custom_op("flashdp::bound_scales", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def bound_scales(anchor: Tensor, place: int) -> Tensor:
    """The present scales, float32 [K]. `anchor` only ties them to the backward."""
    return _known[place].scales.clone()


@bound_scales.register_fake
def _(anchor: Tensor, place: int) -> Tensor:
    return anchor.new_empty((len(_known[place].groups),), dtype=torch.float32)


@torch.library.custom_op("flashdp::count_within", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def count_within(scales: Tensor, sqnorms: Sequence[Tensor], mean: bool, place: int) -> Tensor:
    """A copy of the scales [K], after `within` was set from the squared norms [B] of each group.

    `mean`: the loss is a mean over the samples, so a sample's own gradient is B times its term. A sample whose norm is
    not finite, or next to nothing beside its bound, counts neither way: it may be a row of padding. The bounds
    are those that `prepare` was told.
    """
    found = torch.stack(list(sqnorms)).sqrt() * (max(sqnorms[0].shape[0], 1) if mean else 1)
    share = found / (scales * _known[place].bounds)[:, None]
    votes = torch.where(share <= 1, 0.5, -0.5) * ((share > NOTHING) & (share < math.inf))
    _known[place].within.copy_(votes.sum(1))
    return scales.clone()


@count_within.register_fake
def _(scales: Tensor, sqnorms: Sequence[Tensor], mean: bool, place: int) -> Tensor:
    return torch.empty_like(scales)
