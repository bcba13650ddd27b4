"""All strategies. To add one: write it beside the others and enter it here; plan and tests find it from this list."""

from collections.abc import Callable

from flashdp_compile.kernels.probes import LEAST
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Strategy
from flashdp_compile.passes.strategies.embedding import EMBEDDING, TIED, TIED_STORE
from flashdp_compile.passes.strategies.linear import GRAM, OUTER, STORE
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.passes.strategies.sketch import hutchinson, hutchplusplus, pays, tied_hutchinson, worthwhile

STRATEGIES: tuple[Strategy, ...] = (GRAM, OUTER, STORE, EMBEDDING, TIED, TIED_STORE, MATERIALIZE)
NAMES = tuple(dict.fromkeys(strategy.name for strategy in STRATEGIES))  # what the option norm_strategy may ask for
ESTIMATORS: dict[str, tuple[Callable[[int], Strategy], ...]] = {  # by the option `norm`: from a number of probes
    "exact": (),
    "auto": (hutchinson, tied_hutchinson),
    "hutchinson": (hutchinson, tied_hutchinson),
    "hutch++": (hutchplusplus,),
}
# each may be taken where another does not apply, and an engine does not know which was
MOST_SLACK = max(s.slack for s in (*STRATEGIES, *(make(LEAST) for own in ESTIMATORS.values() for make in own)))


def candidates(gradient: ParameterGradient, axes: Axes) -> tuple[Strategy, ...]:
    """The strategies that can treat a gradient; never empty, since materialising treats all."""
    return tuple(s for s in STRATEGIES if s.applies(gradient, axes))


def estimates(norm: str, probes: int, gradient: ParameterGradient, axes: Axes) -> tuple[Strategy, ...]:
    """The strategies that estimate a gradient's norm under the option `norm`; none for a small layer.

    Nothing but the layer's own widths and the number of probes may have a say: a sample's weight must not depend on how
    many others are there, nor on how long they are.
    """
    found = [make(probes) for make in ESTIMATORS[norm]]
    large = worthwhile if norm == "auto" else pays
    return tuple(s for s in found if s.applies(gradient, axes) and large(gradient, axes, probes))
