"""index_put under vmap, for batches of a size that is not known when the graph is traced.

torch's own vmap rule asks whether the values are empty, which nobody can answer for an unbacked batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def index_put(table: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool) -> Tensor:
    """table[indices] (+)= values, out of place; indices are integers. May be called under one torch.vmap."""
    return _IndexPut.apply(table, values, accumulate, *indices)


class _IndexPut(torch.autograd.Function):
    @staticmethod
    def forward(table: Tensor, values: Tensor, accumulate: bool, *indices: Tensor | None) -> Tensor:
        return aten.index_put(table, indices, values, accumulate)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: a rewritten graph is not differentiated again."""

    @staticmethod
    def vmap(
        info: Any, dims: Any, table: Tensor, values: Tensor, accumulate: bool, *indices: Tensor | None
    ) -> tuple[Tensor, int]:
        """The samples become one more dimension that is indexed, the first, by 0, 1, ..., B-1."""
        batch, index_dims = info.batch_size, dims[3:]
        rank = max(i.dim() - (d is not None) for i, d in zip(indices, index_dims, strict=True) if i is not None)
        table = table.unsqueeze(0).expand(batch, *table.shape) if dims[0] is None else table.movedim(dims[0], 0)
        samples = torch.arange(batch, device=table.device).view(-1, *[1] * rank)
        own = [None if i is None else _lead(i, d, rank) for i, d in zip(indices, index_dims, strict=True)]

        positions = [p for p, i in enumerate(indices) if i is not None]
        kept = table.dim() - 1 - len(positions)
        values = _lead(values, dims[1], rank + kept)
        if positions == list(range(positions[0], positions[-1] + 1)):
            # adjacent indices stay in their place, but with the samples in front they are so only from dimension 0
            start = 1 + positions[0]
            values = values.movedim(list(range(start, start + rank)), list(range(1, 1 + rank)))
        return aten.index_put(table, [samples, *own], values, accumulate), 0


def _lead(x: Tensor, dim: int | None, rank: int) -> Tensor:
    """Samples first (one for all where there are none), then `rank` dimensions, new ones in front."""
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.reshape(x.shape[0], *[1] * (rank + 1 - x.dim()), *x.shape[1:])
