"""Clipping groups: which parameters share one norm, and the bound of each group.

A mechanism that releases groups k with bounds C_k has sensitivity C = sqrt(sum_k C_k^2), to which the noise of every
group is calibrated (McMahan et al. 2018, "A general approach to adding differential privacy", section 2.2).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from flashdp_compile.errors import OptionError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """Parameters clipped together to `bound`; `members` are their names."""

    name: str
    bound: float
    members: tuple[str, ...]


class BoundsPlace(NamedTuple):
    """Bounds that move: their place in runtime/bounds.py, and the names of a graph's groups in the order of its scales,
    which are those of a `kind` there."""

    place: int
    groups: tuple[str, ...]
    kind: int = 0


def sensitivity(groups: Sequence[Group]) -> float:
    """The L2 norm of all that one sample can contribute: sqrt of the sum of the squared bounds."""
    return math.sqrt(sum(g.bound**2 for g in groups))


def form_groups(
    names: Sequence[str], clipping: str | Mapping[str, str], max_grad_norm: float | Mapping[str, float]
) -> tuple[Group, ...]:
    """The groups of the named parameters, in the order of first appearance.

    Raises `OptionError` if a pattern mapping leaves a parameter out, or a group's members match different bounds.
    """
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(_group_of(name, clipping), []).append(name)
    shared = None if isinstance(max_grad_norm, Mapping) else float(max_grad_norm) / math.sqrt(max(len(members), 1))
    return tuple(
        Group(group, _bound(group, inside, max_grad_norm) if shared is None else shared, tuple(inside))
        for group, inside in members.items()
    )


def _group_of(name: str, clipping: str | Mapping[str, str]) -> str:
    if clipping == "flat":
        return "all"
    if clipping == "per_layer":
        return name.rpartition(".")[0] or "(root)"
    assert isinstance(clipping, Mapping)
    return _match(name, clipping, "clipping")


def _match(name: str, patterns: Mapping[str, Value], option: str) -> Value:
    for pattern, value in patterns.items():
        if fnmatch.fnmatchcase(name, pattern):
            return value
    raise OptionError(
        f"{option} has no pattern for parameter '{name}'; its patterns are {', '.join(map(repr, patterns))}. Every "
        "trainable parameter must be in a group: add a pattern, or '*' as the last one for all others."
    )


def _bound(group: str, inside: Sequence[str], max_grad_norm: float | Mapping[str, float]) -> float:
    assert isinstance(max_grad_norm, Mapping)
    bounds = {name: _match(name, max_grad_norm, "max_grad_norm") for name in inside}
    if len(set(bounds.values())) > 1:
        raise OptionError(
            f"max_grad_norm gives clipping group '{group}' several bounds: "
            + ", ".join(f"{name}: {bound}" for name, bound in bounds.items())
            + ". A group is clipped as one: let its patterns agree."
        )
    return float(next(iter(bounds.values())))
