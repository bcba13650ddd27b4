"""The values of `Options` that take more than a line to check: each function returns what the field will hold."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from flashdp_compile.checks import PROBES, choice, integer, nearest, not_allowed, number, patterns
from flashdp_compile.compat import GRAPH_HOOKS, inductor_option_names, is_scaler, launch_settings
from flashdp_compile.errors import OptionError

NEVER = 2**31 - 1  # steps until a scale grows: the largest number that a scaler takes


def max_grad_norm(value: Any, clipping: Any) -> float | dict[str, float]:
    """A bound, or one for each pattern, which only several groups have a use for."""
    if not isinstance(value, Mapping):
        return number("max_grad_norm", value, positive=True)
    if clipping == "flat":
        raise OptionError(
            f"max_grad_norm={dict(value)!r} states several bounds, but clipping='flat' has one group; "
            "allowed: a single number, or clipping='per_layer' or {pattern: group}"
        )
    pairs = patterns("max_grad_norm", value, "bound")
    return {pattern: number(f"max_grad_norm[{pattern!r}]", bound, positive=True) for pattern, bound in pairs.items()}


def clipping(value: Any) -> str | dict[str, str]:
    """The name of a rule, or {pattern: group}."""
    if not isinstance(value, Mapping):
        return choice("clipping", value, ("flat", "per_layer"), also="a dict {pattern: group name}")
    groups = patterns("clipping", value, "group name")
    for pattern, group in groups.items():
        if not isinstance(group, str) or not group:
            raise not_allowed(f"clipping[{pattern!r}]", group, "the name of a group, a string that is not empty")
    return groups


def batch_dim(value: Any) -> int | dict[str, int]:
    """A dimension, or {pattern: dimension}."""
    if not isinstance(value, Mapping):
        return integer("batch_dim", value, 0)
    pairs = patterns("batch_dim", value, "dimension")
    return {pattern: integer(f"batch_dim[{pattern!r}]", dim, 0) for pattern, dim in pairs.items()}


def probes(value: Any) -> int:
    """A power of two: how many probes a norm is estimated from."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in PROBES:
        raise not_allowed(
            "probes", value, f"one of {', '.join(map(str, PROBES))}, the same for all data and steps; they are Gaussian"
        )
    return value


def public_inputs(value: Any) -> tuple[str, ...]:
    """Names or globs."""
    allowed = "a sequence of input names or globs, such as ('attention_mask',)"
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise not_allowed("public_inputs", value, allowed)
    if not all(isinstance(name, str) and name for name in value):
        raise not_allowed("public_inputs", value, allowed)
    return tuple(value)


def grad_scaler(scaler: Any) -> Any:
    """A scaler whose scale stays what it is, or None."""
    if scaler is None:
        return None
    if not is_scaler(scaler):
        raise not_allowed("grad_scaler", scaler, "a torch.amp.GradScaler or None")
    if not scaler.is_enabled():
        return None
    if scaler.get_growth_interval() < NEVER:
        raise OptionError(
            f"grad_scaler doubles its scale every {scaler.get_growth_interval()} steps, and nothing would stop it: "
            "a sample whose gradient overflows contributes zero, so the scaler sees no infinity and never goes "
            f"back. Make it with growth_interval={NEVER} and change the scale by scaler.update(new_scale)"
        )
    return scaler


def from_engine(value: Any, noise_at: Any) -> Any:
    """What a PrivacyEngine gives, a `runtime.from_engine.FromEngine`, or None."""
    if value is not None and (noise_at != "step" or not hasattr(value, "told")):
        raise OptionError(
            "from_engine is what a PrivacyEngine hands to the graphs of a model: let the engine compile it"
        )
    return value


def inductor(value: Any) -> dict[str, Any]:
    """Settings that Inductor knows, and that undo nothing of what is proved."""
    if not isinstance(value, Mapping):
        raise not_allowed("inductor", value, "a dict {name in torch._inductor.config: value}")
    settings = dict(value)
    fixed = launch_settings() if settings else {}
    for name in settings:
        if name in GRAPH_HOOKS:
            raise OptionError(f"inductor[{name!r}] could change the graph after flashdp has proved it; not allowed")
        if name in fixed:
            raise OptionError(f"inductor[{name!r}] could break the kernels that flashdp launches; not allowed")
    if settings:
        known = inductor_option_names()
        for name in settings:
            if name not in known:
                raise OptionError(
                    f"inductor has the unknown name {name!r}{nearest(name, known)}; "
                    "allowed: names in torch._inductor.config"
                )
    return settings


def debug(value: Any) -> bool | str:
    """Whether, or where to write."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return os.fspath(value)
    raise not_allowed("debug", value, "True, False or a folder")
