"""Along which dimension each input holds the samples, and how many there are: one number, or one symbol, for all."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from flashdp_compile.compat import known_size, settle_equal, settle_size, size_expression
from flashdp_compile.errors import InputError
from flashdp_compile.passes.axes.domain import Size, same
from flashdp_compile.passes.inputs import Input

BatchDim = int | Mapping[str, int]
"""The dimension along which the samples lie: of all inputs, or {glob over input names: dimension}, the first match
counts, and 0 is that of all others."""


def batch_dim_of(batch_dim: BatchDim, name: str) -> int:
    """The dimension of one input along which the samples lie."""
    if isinstance(batch_dim, int):
        return batch_dim
    return next((dim for pattern, dim in batch_dim.items() if fnmatch.fnmatchcase(name, pattern)), 0)


def check_patterns(batch_dim: BatchDim, names: Sequence[str]) -> None:
    """A misspelt name must not leave an input with dimension 0: each step in time would then count as a sample."""
    for pattern in batch_dim if isinstance(batch_dim, Mapping) else ():
        if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"batch_dim names {pattern!r}, and no input that holds samples is called that: they are "
                f"{', '.join(names) or 'none'}"
            )


def batch_size(samples: Mapping[fx.Node, Input], dims: Mapping[fx.Node, int]) -> Size:
    """The size that all samples share. Raises `InputError` where there is none."""
    sizes: dict[fx.Node, Any] = {}
    for node, described in samples.items():
        value = node.meta["val"]
        if not -value.dim() <= dims[node] < value.dim():
            raise InputError(_undecided(described, f"has no dimension {dims[node]}", dims[node]))
        sizes[node] = _settled(value.shape[dims[node]])
    settled = {n for n in sizes.values() if isinstance(n, int) and n < 2}
    if len(settled) == 1:  # torch has fixed the size of some inputs only: the others' follow, if they have it now
        (number,) = settled
        for node in sizes:
            if settle_size(node.meta["val"].shape[dims[node]], number):
                sizes[node] = number
    if not sizes:
        raise InputError(
            "flashdp found no input that holds samples: the compiled region takes no tensor besides parameters and "
            "buffers. Pass the batch as an argument of the compiled module."
        )
    (first, batch), *rest = sizes.items()
    for node, size in rest:
        # dynamo names the sizes of two inputs apart until an op has joined them
        if not same(size, batch) and not settle_equal(*(n.meta["val"].shape[dims[n]] for n in (node, first))):
            fewest = node if node.meta["val"].dim() <= first.meta["val"].dim() else first
            raise InputError(
                _undecided(
                    samples[fewest],
                    f"and another input disagree on the batch size: {samples[first].name} has {batch} samples, "
                    f"{samples[node].name} has {size},",
                    dims[fewest],
                )
            )
    return _settled(first.meta["val"].shape[dims[first]])


def _settled(size: Any) -> Size:
    """None and one are cases of their own, even where a symbol still stands for them."""
    return next((n for n in (0, 1) if known_size(size, n)), size_expression(size))


def _undecided(described: Input, problem: str, batch_dim: int) -> str:
    return (
        f"flashdp cannot tell the batch axis of input '{described.name}' [{', '.join(described.shape)}]: it {problem} "
        f"where batch_dim={batch_dim}. If it is the same for all samples and holds no private data (a table, a mask "
        f"over positions), declare it: options={{'public_inputs': ['{described.name}']}}. If the batch is another "
        f"dimension, set options={{'batch_dim': ...}}, or for this input alone {{'batch_dim': {{'{described.name}': "
        "...}}."
    )
