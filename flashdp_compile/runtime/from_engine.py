"""What a PrivacyEngine hands to the graphs that it lets compile: of each kind one thing, or none.

A further kind is a field of `FromEngine`. If graphs depend on it, it is one of `_for_graphs`, too: it says by `told`
how they do, and each backward calls its `begin`. What passes need to know of it is in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flashdp_compile.runtime.bounds import BoundScales, Moved
from flashdp_compile.runtime.part_runs import PartRuns
from flashdp_compile.runtime.probe_keys import HeldProbes
from flashdp_compile.runtime.seen_samples import SeenSamples


class FromEngine(NamedTuple):
    """`bounds`: how far clipping bounds have moved. `probes`: those that norms are estimated with. `seen`: looks at
    what several ranks are given that the engine has not drawn. All graphs of an engine have the same of these; `parts`,
    what the parts of a model know of each other, is for graphs of parts."""

    bounds: BoundScales | None = None
    probes: HeldProbes | None = None
    parts: PartRuns | None = None
    seen: SeenSamples | None = None

    @property
    def _for_graphs(self) -> tuple[BoundScales | HeldProbes | PartRuns | None, ...]:
        return self.bounds, self.probes, self.parts

    @property
    def shared(self) -> PartRuns | None:
        """The parts, if one bound holds for all of them together."""
        return self.parts if self.parts is not None and self.parts.shared else None

    @property
    def begins(self) -> bool:
        """Whether a backward has to be told that it begins."""
        return any(kept is not None for kept in self._for_graphs)

    @property
    def measuring(self) -> bool:
        """Whether only norms are wanted of the backward that runs."""
        return self.parts is not None and self.parts.measuring

    @property
    def probes_moved(self) -> int | None:
        """How many releases have used up probes; None where norms are exact."""
        return None if self.probes is None else self.probes.moves

    def estimates(self, norm: str, probes: int) -> bool:
        """Whether there are probes for norms that are estimated so, as the accountant was told."""
        return self.probes is not None and (self.probes.norm, self.probes.probes) == (norm, probes)

    def told(self) -> list[Any]:
        """All that can change a graph, as JSON takes it."""
        return [None if kept is None else kept.told() for kept in self._for_graphs]

    def prepare(self, groups: Mapping[str, float], members: Sequence[Sequence[Tensor]]) -> None:
        """Before what is compiled runs: `groups` are the names and bounds of its clipping groups, `members` the
        parameters of each. Raises Refusal for bounds that move if they are those of another model."""
        if self.bounds is not None and groups:
            self.bounds.prepare(groups, members)
        if self.probes is not None:
            for device in {parameter.device for group in members for parameter in group}:
                self.probes.prepare(device)

    def check(self, groups: Mapping[str, float]) -> None:
        """Raises Refusal unless the groups of the gradients that a graph has are those that were counted on. Where it
        is a part of a model, the engine has counted those of all parts, and one that is frozen has none."""
        if self.probes is not None and self.parts is None:
            self.probes.check(groups)
        if self.bounds is not None and (groups or self.parts is None):
            self.bounds.check(groups)

    def begin(self, part: int | None) -> None:
        """A backward begins, of a whole model (None) or of a part."""
        for kept in self._for_graphs:
            if kept is not None:
                kept.begin(part)

    def taken(self) -> tuple[Moved | None, int | None]:
        """What the backward that has just run had of bounds that move, and `probes_moved`."""
        return None if self.bounds is None else self.bounds.take(), self.probes_moved
