"""Batches that differ in one sample. A batch is a tensor, or tuples, lists and dicts of tensors, each with its samples
along dimension 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.errors import OptionError


def rows(batch: Any) -> int:
    """How many samples it has. Raises OptionError where tensors disagree."""
    sizes = sorted({t.shape[0] if t.dim() else 0 for t in _tensors(batch)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise OptionError(
            f"batch holds tensors of {sizes or 'no'} rows; allowed: the same number in each, samples along "
            "dimension 0. What no sample owns belongs into the loss"
        )
    return sizes[0]


def without(batch: Any, sample: int) -> Any:
    """One sample less."""
    return _map(lambda t: torch.cat([t[:sample], t[sample + 1 :]]), batch)


def replaced(batch: Any, sample: int, others: Any, other: int) -> Any:
    """One sample replaced by one of another batch."""
    sources = _tensors(others)

    def put(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[sample] = next(sources)[other]
        return changed

    return _map(put, batch)


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [_map(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    raise OptionError(f"batch holds a {type(batch).__name__}; allowed: tensors, and tuples, lists and dicts of them")


def _tensors(batch: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    _map(lambda t: found.append(t) or t, batch)  # type: ignore[func-returns-value]
    return iter(found)
