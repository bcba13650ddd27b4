"""Rows of matrix operands that start where descriptors can read them.

A vocabulary of 50257 makes rows of 100514 bytes, and a TMA descriptor moves rows that start at multiples of 16. When
Inductor makes such a tensor it pads the rows, for its own matrix products, but hands over to a launch the strides that
the launch was traced with: a second, unpadded tensor, which pointers read element by element. So the operands of our
kernels are traced with the strides that Inductor chooses. Where it chose others, it copies.

Runs behind the proof: values stay what they are, only the distance of their rows changes.
"""

from __future__ import annotations

import torch
from torch import fx

from flashdp_compile.compat import padded_row
from flashdp_compile.kernels import tuning

flashdp = torch.ops.flashdp
READERS = (
    flashdp.outer_store.default,
    flashdp.outer_sqnorm.default,
    flashdp.gram_sqnorm.default,
    flashdp.weighted_matmul.default,
)


def align_rows(graph: fx.Graph, device: str = "cuda") -> int:
    """Gives every operand that descriptors could read, but for its strides, aligned ones; returns how many."""
    readers = [n for op in READERS for n in graph.find_nodes(op="call_function", target=op)]
    operands = {n: None for reader in readers for n in reader.args[:2] if isinstance(n, fx.Node)}
    return sum(_align(n) for n in operands if n.meta["val"].device.type == device)


def _align(node: fx.Node) -> bool:
    value = node.meta["val"]
    static = all(isinstance(n, int) for n in (*value.shape, *value.stride()))
    made_here = node.op == "call_function"
    if not (static and made_here and value.is_contiguous() and value.element_size() == 2):
        return False
    if value.shape[2] * 2 % 16 == 0 or not tuning.has_tma(value.device):
        return False
    _, T, width = value.shape
    row = padded_row(width, value.dtype)
    node.meta["val"] = value.new_empty_strided(value.shape, (T * row, row, 1))
    return row != width
