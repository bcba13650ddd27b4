"""Equal ids side by side: what the kernels of an embedding table share."""

import torch
from torch import Tensor


def by_id(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids [B * T] in order, and the position b T + t of each; samples stay in order within an id."""
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    return ordered, order


def warps(block_d: int) -> int:
    """Warps whose registers hold such a row."""
    return 4 if block_d <= 8192 else 8


def blocks(d: int) -> tuple[int, int]:
    """A whole row of d entries, and how many rows fit into the registers beside the sum."""
    block = max(16, 1 << (d - 1).bit_length())
    return block, max(1, min(16, 8192 // block))
