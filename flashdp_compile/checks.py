"""Checks of single values: each returns the value in its plain type, or raises an OptionError that names the field,
shows the value and says what is allowed."""

import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, overload

from flashdp_compile.errors import OptionError

_FLOAT32_TINY, _FLOAT32_MAX = 2.0**-126, 3.4028234663852886e38

PROBES = (16, 32, 64, 128, 256)  # what a norm may be estimated from: powers of two, as the kernels' tiles are


def not_allowed(name: str, value: Any, allowed: str) -> OptionError:
    return OptionError(f"{name}={value!r} ({type(value).__name__}); allowed: {allowed}")


def number(name: str, value: Any, *, positive: bool) -> float:
    """Gradients and noise are float32, so a bound or a scale outside its range would turn into 0 or inf."""
    allowed = "a finite number greater than 0" if positive else "a finite number, 0 or greater"
    if isinstance(value, bool) or not isinstance(value, Real):  # bool is an int in Python, and never meant here
        raise not_allowed(name, value, allowed)
    try:
        found = float(value)
    except OverflowError:  # an int too long for a float
        found = math.inf
    tiny = found < _FLOAT32_TINY and (positive or found != 0)
    if not math.isfinite(found) or tiny or found > _FLOAT32_MAX:
        raise not_allowed(name, value, f"{allowed}, within the range of float32")
    return found


@overload
def integer(name: str, value: Any, least: int) -> int: ...


@overload
def integer(name: str, value: Any, least: int, *, optional: bool) -> int | None: ...


def integer(name: str, value: Any, least: int, *, optional: bool = False) -> int | None:
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**63:
        raise not_allowed(name, value, f"an integer, {least} or greater" + (", or None" if optional else ""))
    return int(value)


def choice(name: str, value: Any, choices: Sequence[str], also: str = "") -> str:
    if not isinstance(value, str) or value not in choices:
        near = nearest(value, choices) if isinstance(value, str) else ""
        listed = ", ".join([*(repr(c) for c in choices), *([also] if also else [])])
        raise OptionError(f"{name}={value!r}{near}; allowed: {listed}")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise not_allowed(name, value, "True or False")
    return value


def patterns(name: str, table: Mapping[str, Any], holds: str) -> dict[str, Any]:
    if not table or not all(isinstance(pattern, str) and pattern for pattern in table):
        raise not_allowed(name, dict(table), f"{{pattern: {holds}}} with at least one pattern, each a string")
    return dict(table)


def nearest(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first name under which two configurations have different values, one that only one of them has included."""
    return next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)


def comparable(value: Any) -> Any:
    """A value of a configuration as JSON gives it back, which knows no tuples. The order of mappings counts."""
    if isinstance(value, Mapping):
        return [[str(k), v] for k, v in value.items()]
    return [list(pair) for pair in value] if isinstance(value, (list, tuple)) else value
