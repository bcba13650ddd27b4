"""All strategies. To add one: write it beside the others and enter it here; plan and tests find it from this list."""

from flashdp_compile.kernels.guard import SLACK
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Strategy
from flashdp_compile.passes.strategies.embedding import EMBEDDING, TIED
from flashdp_compile.passes.strategies.linear import GRAM, OUTER, STORE
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.passes.strategies.sketch import hutchinson, hutchplusplus, pays, tied_hutchinson, worthwhile

STRATEGIES: tuple[Strategy, ...] = (GRAM, OUTER, STORE, EMBEDDING, TIED, MATERIALIZE)
NAMES = tuple(dict.fromkeys(strategy.name for strategy in STRATEGIES))  # what the option norm_strategy may ask for
MOST_SLACK = max(SLACK, *(strategy.slack for strategy in STRATEGIES))  # each may be taken where another does not apply


def candidates(gradient: ParameterGradient, axes: Axes) -> tuple[Strategy, ...]:
    """The strategies that can treat a gradient; never empty, since materialising treats all."""
    return tuple(s for s in STRATEGIES if s.applies(gradient, axes))


def estimates(norm: str, probes: int, gradient: ParameterGradient, axes: Axes) -> tuple[Strategy, ...]:
    """The strategies that estimate a gradient's norm under the option `norm`; none for a small layer.

    Nothing but the layer's own widths and the number of probes may have a say: a sample's weight must not depend on how
    many others are there, nor on how long they are.
    """
    found = {
        "exact": (),
        "auto": (hutchinson(probes), tied_hutchinson(probes)),
        "hutchinson": (hutchinson(probes), tied_hutchinson(probes)),
        "hutch++": (hutchplusplus(probes),),
    }[norm]
    large = worthwhile if norm == "auto" else pays
    return tuple(s for s in found if s.applies(gradient, axes) and large(gradient, axes, probes))
