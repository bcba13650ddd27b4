"""Clipping bounds that move from step to step: how far each is from the one that was compiled, and who lies within.

A group of parameters whose bound is C_k was compiled for it. While its scale is rho_k, a backward clips g / rho_k to
C_k, which is g clipped to rho_k C_k, over rho_k (under clip_fn "automatic" with rho_k gamma in the place of gamma). So
what one sample adds to the sums never exceeds what was compiled, whatever the scales are; whoever adds noise to it
multiplies by rho_k afterwards.

Compiled code knows the scales of a run by their place in a list of this process, as it knows scalers (scaling.py). Of a
model in parts (parts.py) each has a section of the scales. Parts of one class share their code, so that which of them
runs backward is told (`begin`); the code knows for which groups it was made.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashdp_compile.compat import real_tensors
from flashdp_compile.errors import Refusal

__all__ = ["BoundScales", "PartGroup", "bound_scales", "count_within"]

FAR = 2.0**60  # scales stay between this and its inverse
NOTHING = 2.0**-30  # a norm below so small a part of its bound is that of no sample, but of padding

_known: list[BoundScales] = []


class Moved(NamedTuple):
    """What a backward had of moving bounds: votes and scales, each [K]; and how often the scales had moved before. The
    votes of one that is a part's are 0 in the groups of all others."""

    votes: Tensor
    scales: Tensor
    moves: int


class PartGroup(NamedTuple):
    """A clipping group of a part: what it is called within it and in the whole model, its bound, and the parameters
    that an optimizer has for it."""

    name: str
    full_name: str
    bound: float
    members: Sequence[Tensor]


class Section(NamedTuple):
    """Where the groups of a part are among all scales, and which of `BoundScales.kinds` they are."""

    kind: int
    scales: slice


class BoundScales:
    """The scales rho [K] of the clipping groups of a model, on its device, once it is compiled.

    `groups` are their names and compiled bounds. `within` [K] is of the last backward: half a sample for each that has
    a norm within its bound, less half a sample for each whose norm is beyond it. So one sample moves it by 1/2 in each
    group, whether it is there or not. `kinds`: the groups that a graph may be made for, by their names within it; all
    of them, or those of a part.
    """

    def __init__(self) -> None:
        self.place = len(_known)
        _known.append(self)
        self.groups: dict[str, float] = {}
        self.kinds: list[dict[str, float]] = []
        self.scales = self.within = self.bounds = torch.ones(0)
        self.moves = 0
        self._first: Sequence[float] | Mapping[str, float] = [1.0]
        self._group_of: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._numbers: dict[int, int] = {}
        self._running: int | None = None
        self._sections: dict[int | None, Section] = {}  # by the number of a part; a whole model is None
        self._planned: dict[str, float] = {}  # the groups of a model in parts, whose device is not known yet

    def divide(self, parts: Mapping[int, Sequence[PartGroup]]) -> None:
        """Tells of a model that will be compiled part by part, which groups each of its parts has. Those without
        trainable parameters have none.

        Raises Refusal if there is a model already.
        """
        if self.kinds:
            raise Refusal(
                "a second model is compiled for the moving bounds of the first: give each model an engine of its own"
            )
        for part, groups in parts.items():
            ordered, first = sorted(groups, key=lambda group: group.name), len(self._planned)  # for parts of one class
            for group in ordered:
                assert group.full_name not in self._planned
                self._enter(len(self._planned), group.members)
                self._planned[group.full_name] = group.bound
            kind = {group.name: group.bound for group in ordered}
            if kind not in self.kinds:
                self.kinds.append(kind)
            self._sections[part] = Section(self.kinds.index(kind), slice(first, len(self._planned)))

    def prepare(self, groups: Mapping[str, float], members: Sequence[Sequence[Tensor]]) -> None:
        """Makes the scales, all 1 or as they were loaded, unless they are there. `groups` are the names and bounds of
        the clipping groups of what is compiled, `members` the parameters of each.

        Raises Refusal for a model, or a part of one, with other groups than are known, and for one on several devices,
        or on another one.
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
        if not self.kinds:
            self.kinds = [dict(groups)]
            self._sections[None] = Section(0, slice(0, len(groups)))
        if dict(groups) not in self.kinds:
            raise Refusal(self._unknown(groups))
        if None in self._sections:  # of parts these are known already, and are no parameters that an optimizer has
            order = {name: number for number, name in enumerate(self.kinds[0])}
            for name, group in zip(groups, members, strict=True):
                self._enter(order[name], group)
        if self.groups:
            return
        self.groups = self._planned or dict(groups)
        with real_tensors(), torch.inference_mode(False):  # ordinary tensors, whatever mode is on
            self.scales = torch.ones(len(self.groups), dtype=torch.float32, device=devices.pop())
            self.within = torch.zeros_like(self.scales)
            self.bounds = torch.tensor([*self.groups.values()]).to(self.scales)
            self.load(self._first)

    def check(self, groups: Mapping[str, float]) -> None:
        """Raises Refusal unless a graph that has gradients for these groups has them for all that were prepared."""
        if dict(groups) not in self.kinds:
            wider = [kind for kind in self.kinds if groups.keys() <= kind.keys()]
            without = list(dict.fromkeys(name for kind in wider for name in kind if name not in groups))
            raise Refusal(
                f"nothing in this step depends on the parameters of {', '.join(without) or 'some groups'}, but bounds "
                "that move are counted for all that can be trained. Freeze what is not used: requires_grad_(False)"
            )

    def told(self) -> Any:
        """All that can change a graph, as JSON takes it."""
        return [self.place, [[*kind.items()] for kind in self.kinds]]

    def _enter(self, number: int, members: Sequence[Tensor]) -> None:
        for parameter in members:
            self._group_of[id(parameter)], self._numbers[id(parameter)] = parameter, number

    def _unknown(self, groups: Mapping[str, float]) -> str:
        if None in self._sections:
            return (
                "a second model, or the same one with other trainable parameters, is compiled for the moving bounds of "
                f"the first. Its clipping groups are {', '.join(groups)}; those of the first were "
                f"{', '.join(self.kinds[0])}. Give each model an engine of its own"
            )
        return (
            f"what is compiled has the clipping groups {', '.join(groups)}, but bounds that move are kept for all "
            f"trainable parameters of each part of the model: {' or '.join(', '.join(kind) for kind in self.kinds)}. "
            "Freeze what a part does not use: requires_grad_(False). A second model needs an engine of its own"
        )

    def begin(self, part: int | None) -> None:
        """A backward begins, of a whole model (None) or of a part: what one that has failed has counted is dropped."""
        self._running = part
        self.forget()

    def section(self, kind: int) -> slice:
        """Which scales are those of the backward that runs, in a graph that was made for groups of this kind.

        Raises Refusal if it has others.
        """
        found = self._sections.get(self._running)
        if found is None or found.kind != kind:
            own = "unknown" if found is None else ", ".join(self.kinds[found.kind])
            raise Refusal(
                f"a graph that was compiled for the clipping groups {', '.join(self.kinds[kind])} runs backward for "
                f"a model, or a part of one, whose groups are {own}: bounds that move are kept for all trainable "
                "parameters. Freeze what a part does not use, and give a second model an engine of its own"
            )
        return found.scales

    def load(self, scales: Sequence[float] | Mapping[str, float]) -> None:
        """Takes these, by the names of groups or in their order, or the same one for all groups, now or as soon as the
        model is compiled.

        Raises Refusal unless there is one, or one for each group.
        """
        self._first = dict(scales) if isinstance(scales, Mapping) else list(scales)
        if not self.groups:
            return
        named = isinstance(scales, Mapping)
        if len(scales) != len(self.groups) and (named or len(scales) > 1):  # one for all is where every run begins
            raise Refusal(
                f"the run that is resumed had {len(scales)} clipping groups, and this model has {len(self.groups)}: "
                "its bounds were those of another model"
            )
        if isinstance(scales, Mapping):  # a model in parts has its groups in another order than a whole one
            if len(scales) > 1 and scales.keys() != self.groups.keys():
                raise Refusal(
                    f"the run that is resumed had the clipping groups {', '.join(scales)}, and this model has "
                    f"{', '.join(self.groups)}: its bounds were those of another model"
                )
            scales = [scales[name] for name in self.groups] if len(scales) > 1 else [*scales.values()]
        if len(scales) == 1:
            self.scales.fill_(scales[0])  # without waiting for the device: a schedule does so at every step
        else:
            self.scales.copy_(torch.tensor(scales))
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

    def saved(self) -> Sequence[float] | Mapping[str, float]:
        """For `load`."""
        return dict(zip(self.groups, self.scales.tolist(), strict=True)) if self.groups else self._first

    def group_of(self, parameter: Tensor) -> int | None:
        """The number of a parameter's group; None for one that was not compiled."""
        if len(self.groups) == 1:
            return 0
        return self._numbers[id(parameter)] if self._group_of.get(id(parameter)) is parameter else None


@torch.library.custom_op("flashdp::bound_scales", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def bound_scales(anchor: Tensor, place: int, kind: int) -> Tensor:
    """The present scales, float32 [K], of the groups of this kind that run. `anchor` only ties them to the backward."""
    known = _known[place]
    return known.scales[known.section(kind)].clone()


@bound_scales.register_fake
def _(anchor: Tensor, place: int, kind: int) -> Tensor:
    return anchor.new_empty((len(_known[place].kinds[kind]),), dtype=torch.float32)


@torch.library.custom_op("flashdp::count_within", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def count_within(scales: Tensor, sqnorms: Sequence[Tensor], mean: bool, place: int, kind: int) -> Tensor:
    """A copy of the scales [K], after `within` was set from the squared norms [B] of each group, where it is that of
    the groups that run.

    `mean`: the loss is a mean over the samples, so a sample's own gradient is B times its term. A sample whose norm is
    not finite, or next to nothing beside its bound, counts neither way: it may be a row of padding. The bounds
    are those that `BoundScales` was told.
    """
    known = _known[place]
    own = known.section(kind)
    found = torch.stack(list(sqnorms)).sqrt() * (max(sqnorms[0].shape[0], 1) if mean else 1)
    share = found / (scales * known.bounds[own])[:, None]
    votes = torch.where(share <= 1, 0.5, -0.5) * ((share > NOTHING) & (share < math.inf))
    known.within[own].copy_(votes.sum(1))
    return scales.clone()


@count_within.register_fake
def _(scales: Tensor, sqnorms: Sequence[Tensor], mean: bool, place: int, kind: int) -> Tensor:
    return torch.empty_like(scales)
