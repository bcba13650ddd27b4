"""What samples look like that a graph is given, so that ranks can tell whether they were given the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LOOKED_AT = 1 << 20  # elements: a first step is not to take much more memory than others


class SeenSamples:
    """Of an engine whose user draws samples. `wanted`: whether forwards are looked at, as a step is to compare them."""

    def __init__(self) -> None:
        self.wanted = True

    def look(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """[4] of each, in which what is not finite counts as 0: two sums, and the least and the largest element. None
        if they are not wanted; nor of what has no elements, as a rank without samples is given, or complex ones."""
        if not self.wanted or not torch.is_grad_enabled():
            return []
        return [_numbers(x.detach()) for x in inputs if x.numel() and not x.is_complex()]


def distinguishing(seen: Iterable[Tensor]) -> list[list[float]]:
    """What of it two ranks cannot have alike by chance: all but tensors that are the same everywhere, such as masks of
    ones. Waits for their device."""
    numbers = [one.tolist() for one in seen]
    return [one for one in numbers if one[2] != one[3]]


def _numbers(x: Tensor) -> Tensor:
    values = x.flatten()[:LOOKED_AT].double().nan_to_num(0.0, 0.0, 0.0)
    places = torch.arange(1, len(values) + 1, dtype=torch.float64, device=x.device)
    return torch.stack([values.sum(), values @ places.sqrt(), values.min(), values.max()])
