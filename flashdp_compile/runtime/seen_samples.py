"""What samples look like that a graph is given, so that ranks can tell whether they were given the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SeenSamples:
    """Of an engine whose user draws samples. `wanted`: whether the next forward is to be remembered."""

    def __init__(self) -> None:
        self.wanted = True

    def told(self) -> Any:
        """Graphs do not depend on it."""
        return []

    def begin(self, part: int | None) -> None:
        """A backward knows what its forward was given."""

    def look(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """Four numbers of each: two sums, and its least and its largest element. None if it is not wanted, or of what
        has no elements, which are those of a rank without samples."""
        if not self.wanted or not torch.is_grad_enabled():
            return []
        return [_numbers(x.detach()) for x in inputs if x.numel() and not x.is_complex()]


def told_apart(seen: Iterable[Tensor]) -> list[list[float]]:
    """What of it two ranks cannot have alike by chance: all but tensors that are the same everywhere, such as masks of
    ones. Waits for their device."""
    numbers = [one.tolist() for one in seen]
    return [one for one in numbers if one[2] != one[3]]


def _numbers(x: Tensor) -> Tensor:
    values = x.double().flatten()
    places = torch.arange(1, len(values) + 1, dtype=torch.float64, device=x.device)
    return torch.stack([values.sum(), values @ places.sqrt(), values.min(), values.max()])
