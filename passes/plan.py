"""One strategy for every gradient: the fastest by the cost model that fits, or the one asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from flashdp_compile.compat import size_hint
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import Cost, Factors, device_of, linear_factors
from flashdp_compile.passes.groups import Group, form_groups
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Strategy
from flashdp_compile.passes.strategies.catalogue import candidates, estimates
from flashdp_compile.passes.strategies.linear import is_linear
from flashdp_compile.passes.strategies.shared import SharedInput, same_input
from flashdp_compile.passes.values import Values

Timer = Callable[[Strategy, Factors], float | None]

# stands for a symbolic size that has no value yet (an unbacked batch) when choices are compared
TYPICAL_SIZE = 64

# What a fast strategy may hold until the last norm is there, in units of what the smallest one would. Llama 1B at
# 4 x 1024 holds 1.0 to 1.9 times as much in products as in factors, and without the products its step takes 1.2 times
# as long; GPT-2 at 64 x 256 would hold 2.4 to 9 times as much.
HOLD_AT_MOST = 2.0


@dataclass(frozen=True)
class Choice:
    """The strategy of one gradient. `seconds` holds the predicted or measured time of every candidate."""

    gradient: ParameterGradient
    strategy: Strategy
    cost: Cost
    seconds: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """Groups in order, the choices of each group's members, and which of these share an input and are measured once."""

    groups: tuple[Group, ...]
    choices: dict[str, tuple[Choice, ...]]
    shared: dict[str, tuple[SharedInput, ...]] = field(default_factory=dict)

    @property
    def slack(self) -> float:
        """How far rounding may carry a released norm beyond its bound, over all strategies in use."""
        return max((c.strategy.slack for chosen in self.choices.values() for c in chosen), default=0.0)

    @property
    def estimates(self) -> bool:
        """Whether some norm is estimated from probes."""
        return any(c.strategy.probes is not None for chosen in self.choices.values() for c in chosen)


def make_plan(
    gradients: Sequence[ParameterGradient],
    axes: Axes,
    clipping: str | Mapping[str, str],
    max_grad_norm: float | Mapping[str, float],
    norm_strategy: str = "auto",
    timed: Timer | None = None,
    norm: str = "exact",
    probes: int = 0,
) -> Plan:
    """A choice for every gradient. A strategy that is asked for is taken wherever it applies.

    `norm`: whether norms may be estimated, from so many `probes`: "auto" where a layer's widths tend to make that
    faster, "hutchinson" or "hutch++" wherever a layer is large enough, "exact" nowhere.

    `timed` measures what the cost model would predict: seconds of a strategy on factors, None where it cannot tell.
    """
    groups = form_groups([g.name for g in gradients], clipping, max_grad_norm)
    by_name: dict[str, list[ParameterGradient]] = {}
    for gradient in gradients:
        by_name.setdefault(gradient.name, []).append(gradient)
    hints = size_hints(axes)
    members = {group.name: [g for name in group.members for g in by_name.pop(name, [])] for group in groups}
    choices = {
        name: tuple(
            _choose(g, axes, norm_strategy, hints, _waits(own), timed, estimates(norm, probes, g, axes)) for g in own
        )
        for name, own in members.items()
    }
    values = Values(axes.joint.graph)
    shared = {
        name: tuple(
            run
            for strategy in dict.fromkeys(c.strategy for c in chosen if c.strategy.together is not None)
            for run in same_input([c.gradient for c in chosen if c.strategy is strategy], axes, values)
        )
        for name, chosen in choices.items()
    }
    return Plan(groups, choices, shared)


def size_hints(axes: Axes) -> dict[sympy.Symbol, int]:
    """The traced value of every size symbol."""
    hints: dict[sympy.Symbol, int] = {}
    for node in axes.joint.graph.nodes:
        if node.op != "placeholder" or not hasattr(node.meta.get("val"), "shape"):
            continue
        for size in node.meta["val"].shape:
            expression = getattr(getattr(size, "node", None), "expr", None)
            if isinstance(expression, sympy.Symbol):
                hints[expression] = size_hint(size, TYPICAL_SIZE)
    return hints


def evaluate(expression: sympy.Expr, hints: Mapping[sympy.Symbol, int]) -> float:
    """A cost in numbers; a symbol without a hint counts as a typical size."""
    values = {s: hints.get(s, TYPICAL_SIZE) for s in expression.free_symbols}
    return float(expression.subs(values))


def _waits(group: Sequence[ParameterGradient]) -> bool:
    """Whether weights wait for norms of other layers, so that what makes the sums must be held until all are there."""
    return sum(g.kind not in ("bias", "scale", "norm scale") for g in group) > 1


def _choose(
    gradient: ParameterGradient,
    axes: Axes,
    norm_strategy: str,
    hints: Mapping[sympy.Symbol, int],
    waits: bool,
    timed: Timer | None,
    estimated: tuple[Strategy, ...],
) -> Choice:
    """The strategy asked for, or the fastest; of those that hold few bytes, where they are held."""
    device = device_of(gradient)
    options = [(s, s.cost(gradient, axes)) for s in (*candidates(gradient, axes), *estimated)]
    held = {s.name: evaluate(c.held, hints) for s, c in options}
    seconds = {s.name: evaluate(device.seconds(c.kernels), hints) for s, c in options}
    if timed is not None and is_linear(gradient, axes):
        factors = linear_factors(gradient, axes, lambda size: round(evaluate(size, hints)))
        seconds |= {s.name: found for s, _ in options if (found := timed(s, factors)) is not None}
    asked = [o for o in options if o[0] in estimated] or [o for o in options if o[0].name == norm_strategy]
    kept = [o for o in options if not waits or held[o[0].name] <= HOLD_AT_MOST * min(held.values())]
    strategy, cost = asked[0] if asked else min(kept, key=lambda o: seconds[o[0].name])
    return Choice(gradient, strategy, cost, seconds)
