"""The table of rules: one function per op, asked only about values that carry samples.

The engine settles every other case by itself (see engine.py), so a rule sees, in place of each tensor argument of the
op, a `Batched` or `Constant` state, at least one of them `Batched`. It answers with the state of the result (a tuple
for an op with several results) or raises `Reject`. An op without a rule is refused.

`NO_DATA` holds the ops that use nothing but the shape and place of their arguments.

`linear` says separately which ops keep a sum over samples a sum: whether the op is linear in the arguments that are
`Reduced`, the others being constants. `UNIFORM` says which operands must be the same for all samples for a result to be
(see uniform.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashdp_compile.compat import OpOverload
from flashdp_compile.passes.axes.domain import ZERO, Reduced, State

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
LINEAR: dict[Any, Callable[..., bool]] = {}
UNIFORM: dict[Any, Callable[..., Any]] = {}
NO_DATA: set[Any] = set()
ABSENT: set[str] = set()  # names in the tables that this torch does not have: another supported version does

_NAMESPACES = {"aten": torch.ops.aten, "prims": torch.ops.prims, "flashdp": torch.ops.flashdp}


def overloads(name: str) -> list[Any]:
    """`aten.sum.dim_IntList`, or every overload of `aten.sum`; nothing for an op that this torch does not have."""
    namespace, packet, *overload = name.split(".")
    found = getattr(_NAMESPACES[namespace], packet, None)
    names = [] if found is None else overload or found.overloads()
    return [getattr(found, o) for o in names if hasattr(found, o)]


def _known(name: str) -> list[Any]:
    """The overloads of an op; one without a namespace is torch's own, of any of its namespaces."""
    names = [name] if "." in name else [f"{namespace}.{name}" for namespace in ("aten", "prims")]
    found = [op for qualified in names for op in overloads(qualified)]
    if not found:
        ABSENT.add(name)
    return found


def _enter(table: dict[Any, Any], names: tuple[str, ...], entry: Any) -> None:
    for name in names:
        for op in _known(name):
            if op in table:
                raise RuntimeError(f"{op} already has an entry in the table of axis rules")
            table[op] = entry


def linear(condition: Callable[..., bool], *names: str) -> None:
    """Enter ops that keep a sum over samples a sum where `condition` holds of the states of their arguments."""
    _enter(LINEAR, names, condition)


def uniform_step(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what must be uniform for the results of the named ops to be: see uniform.py."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _enter(UNIFORM, names, function)
        return function

    return register


def rule(*names: str, linear: bool | Callable[..., bool] = False) -> Callable[[Rule], Rule]:
    """Register the rule of the named ops; `linear` as True for ops that are linear whatever is reduced."""

    def register(function: Rule) -> Rule:
        _enter(RULES, names, function)
        if linear:
            _enter(LINEAR, names, linear if callable(linear) else always)
        return function

    return register


def no_data(*names: str) -> None:
    """Enter ops whose result carries no data of their arguments."""
    NO_DATA.update(op for name in names for op in _known(name))


def always(*states: Any, **options: Any) -> bool:
    return True


def all_reduced(*states: Any, **options: Any) -> bool:
    """Joining batch sums is linear if every part is one, or zero."""
    parts = [p for s in states for p in (s if isinstance(s, (list, tuple)) else [s]) if isinstance(p, State)]
    return all(isinstance(p, Reduced) or p == ZERO for p in parts)


def one_reduced(*states: Any, **options: Any) -> bool:
    """A product is linear when exactly one factor is a batch sum."""
    return sum(isinstance(s, Reduced) for s in states) == 1


def first_reduced(first: Any, *rest: Any, **options: Any) -> bool:
    """A quotient, or anything with parameters, is linear in its first argument only."""
    return isinstance(first, Reduced) and not any(isinstance(s, Reduced) for s in rest)


def fingerprint() -> list[str] | None:
    """What the tables say, for the key of compile caches; the sources of the rules are in the key by themselves.

    None if a rule or an op is not of this package or of torch: what is cached was proved by it, and it may have changed
    or be gone in the process that finds the cache.
    """
    judged = [*RULES.items(), *LINEAR.items(), *UNIFORM.items()]
    own = all(f.__module__.startswith("flashdp_compile.") for _, f in judged)
    if not own or any(
        getattr(op, "namespace", None) not in _NAMESPACES for op in (*RULES, *LINEAR, *UNIFORM, *NO_DATA)
    ):
        return None
    return sorted([*(f"{op} {f.__module__}.{f.__qualname__}" for op, f in judged), *map(str, NO_DATA)])


def lookup(op: Any) -> Rule | None:
    """The rule of an op. Torch's own ops that it tags as pointwise share one rule unless they have their own."""
    found = RULES.get(op)
    if found is None and is_pointwise(op):
        found = RULES[torch.ops.aten.add.Tensor]
    return found


def is_pointwise(op: Any) -> bool:
    """Whether torch tags an op of its own as pointwise; what others say of theirs is not believed."""
    return isinstance(op, OpOverload) and op.namespace in ("aten", "prims") and torch.Tag.pointwise in op.tags
