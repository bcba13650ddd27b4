"""The clipping bounds of a run that move from step to step (bound_rules.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flashdp_compile.engine.bound_rules import (
    Quantile,
    Saved,
    Schedule,
    deviation_of_votes,
    rule_of,
    sigma_of_gradients,
)
from flashdp_compile.runtime.bounds import BoundScales
from flashdp_compile.runtime.release import Release

AddNoise = Callable[[Tensor, float], Tensor]
"""(what samples have added up to, a deviation) -> the same with noise of that deviation."""


class MovingBounds:
    """The bounds of a run, for a logical batch of `expected_batch_size` samples."""

    def __init__(self, how: Quantile | Schedule, expected_batch_size: int) -> None:
        self._rule, self._batch = rule_of(how), expected_batch_size
        self.state = BoundScales()

    def sigma_of_gradients(self, sigma: float) -> float:
        """Of a step that is accounted for with sigma."""
        return sigma_of_gradients(sigma, self._rule.share)

    def told(self) -> str:
        """For a run that is resumed, which must say the same."""
        return self._rule.told()

    def begin(self, steps_done: int | None, scales: Saved | None = None) -> None:
        """Where a run begins, or goes on with the `scales` that were saved. `steps_done`: None if no more are left."""
        self.state.load(self._rule.first(steps_done, scales))

    def settled(self, steps_done: int) -> float:
        """What is known beforehand of the bounds of the step behind so many: what they are multiplied by.

        Raises OptionError if a schedule says nothing that can be.
        """
        return self._rule.settled(steps_done)

    def wrong(self, releases: Sequence[Release], parameters: Iterable[Tensor]) -> str:
        """Why these backward passes are no logical batch, in the words of an error; empty if they are one."""
        if len({release.moved.moves for release in _of_all_parts(releases) if release.moved is not None}) != 1:
            return "bounds have moved between them: the optimizers of a model step together when bounds move"
        if any(self.state.group_of(parameter) is None for parameter in parameters):
            return (
                "a parameter has taken the place of one that was compiled, and bounds that move know only that: call "
                "torch.compiler.reset() first"
            )
        return ""

    def move(self, releases: Sequence[Release], settled: float, sigma: float, add_noise: AddNoise) -> None:
        """At a step that is counted already: moves on, by the votes of its backward passes, each of which is used but
        once, or to what was `settled` for the next. `add_noise` also adds up over all ranks."""

        def within() -> Tensor:
            votes = torch.zeros_like(self.state.scales)
            for release in _of_all_parts(releases):
                if release.moved is not None:
                    votes += release.moved.votes
                    release.moved = release.moved._replace(votes=torch.zeros_like(votes))
            return add_noise(votes, deviation_of_votes(sigma, self._rule.share, len(votes))) / self._batch + 0.5

        self._rule.move(self.state, settled, within)

    def undone(self, release: Release, parameters: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """The scales [K] that have divided the gradients of a step, and which of them is that of each parameter."""
        assert release.moved is not None
        numbers = []
        for parameter in parameters:
            number = self.state.group_of(parameter)
            assert number is not None  # `wrong` has refused it
            numbers.append(number)
        return release.moved.scales, numbers

    def present(self) -> dict[str, float]:
        """C_k of the next step, by the name of the clipping group; empty before the first forward."""
        if not self.state.groups:
            return {}
        scales = self.state.scales.tolist()
        return {name: bound * s for (name, bound), s in zip(self.state.groups.items(), scales, strict=True)}


def _of_all_parts(releases: Sequence[Release]) -> list[Release]:
    """Where a model is compiled part by part, a backward pass makes a release of each part, once (parts.py has seen to
    it), and is known by one of them."""
    return [peer for release in releases for peer in release.peers]
