"""The clipping groups of a model that is compiled part by part: what is in each, and its share of the bound.

A group is in one part, whose norms its graph knows. Names within a part are those that passes/groups.py gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flashdp_compile.compat import placed_parameters
from flashdp_compile.errors import OptionError
from flashdp_compile.runtime.bounds import PartGroup

BY_PART = "per_block"  # of `clipping`: one group for each part
_PART, _ROOT = "part", "(root)"

Groups = Mapping[str, Mapping[str, Sequence[str]]]
"""By the name of a part, and that of a group within it, the names of its trainable parameters within the part."""


def grouped(parts: Mapping[str, nn.Module], clipping: Any) -> Groups:
    """Raises OptionError for a `clipping` that is not known for parts."""
    if clipping not in ("flat", BY_PART, "per_layer"):
        raise OptionError(
            f"clipping={clipping!r} is not known for a model of sharded parts; allowed: 'flat', {BY_PART!r}, "
            "'per_layer'"
        )
    found: dict[str, dict[str, list[str]]] = {}
    for part, module in parts.items():
        for name in (n for n, p in placed_parameters(module) if p.requires_grad):
            group = name.rpartition(".")[0] or _ROOT if clipping == "per_layer" else _PART
            found.setdefault(part, {}).setdefault(group, []).append(name)
    return found


def bound_options(groups: Groups, options: Mapping[str, Any], clipping: Any) -> dict[str, Any]:
    """The options that give each group of each part its share of the bound of the whole."""
    bound = options["max_grad_norm"]
    count = 1 if clipping == "flat" else sum(map(len, groups.values()))  # part_runs.py: shares are found by each run
    if isinstance(bound, Mapping):
        raise OptionError("max_grad_norm states several bounds, but parts of a sharded model share one: give a number")
    held = options["from_engine"].probes
    if held is not None and held.groups != count:
        raise OptionError(
            f"epsilon was computed for norms that are estimated in {held.groups} clipping group(s), and this model has "
            f"{count}. Give the engine groups={count}"
        )
    kind = clipping if clipping == "per_layer" else {"*": _PART}
    return {"clipping": kind, "max_grad_norm": {"*": bound / math.sqrt(max(count, 1))}}


def groups_that_move(
    parts: Mapping[str, nn.Module], groups: Groups, bound: float, clipping: Any
) -> dict[int, list[PartGroup]]:
    """By the number of a part, for `BoundScales.divide`. Names in the whole model are those of its layers, or parts.

    Raises OptionError for a parameter of several layers: code that parts share may clip it with any of them.
    """
    found: dict[int, list[PartGroup]] = {}
    for number, (part, module) in enumerate(parts.items()):
        if clipping == "per_layer":
            _refuse_tied(part, module)
        for name, members in groups.get(part, {}).items():
            inner = name if clipping == "per_layer" and name != _ROOT else ""
            full_name = f"{part}.{inner}".strip(".") or _ROOT
            sharded = [module.get_parameter(member) for member in members]
            found.setdefault(number, []).append(PartGroup(name, full_name, bound, sharded))
    return found


def _refuse_tied(part: str, module: nn.Module) -> None:
    layers: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layer = f"{part}.{name}".lstrip(".").rpartition(".")[0]
        if parameter.requires_grad and layers.setdefault(id(parameter), layer) != layer:
            raise OptionError(
                f"{layers[id(parameter)]} and {layer} share a weight, so it is not clear with whose bound it moves: "
                f"take clipping={BY_PART!r}, or leave bounds out"
            )
