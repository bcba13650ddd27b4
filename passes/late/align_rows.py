"""Rows of matrix operands that start where descriptors can read them.

A vocabulary of 50257 makes rows of 100514 bytes, and a TMA descriptor moves rows that start at multiples of 16. When
Inductor makes such a tensor it pads the rows, for its own matrix products, but hands over to a launch the strides that
the launch was traced with: a second, unpadded tensor, which pointers read element by element. So the operands of our
kernels are traced with the strides that Inductor chooses. Where it chose others, it copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx

from flashdp_compile.compat import padded_row
from flashdp_compile.kernels import FAMILIES, tuning
from flashdp_compile.passes.nodes import is_static


@contextlib.contextmanager
def aligned_rows(graph: fx.Graph, device: str = "cuda") -> Iterator[list[fx.Node]]:
    """Within, operands that descriptors could read, but for their strides, have aligned ones; gives these operands.

    Afterwards they have their own values again: by the storage of these Inductor tells what shares memory with what,
    and what it may overwrite.
    """
    ops = [f.op.default for f in FAMILIES.values() if f.tiled or f.name == "clipped_product"]  # which runs a tiled one
    readers = [n for op in ops for n in graph.find_nodes(op="call_function", target=op)]
    operands = dict.fromkeys(n for reader in readers for n in reader.all_input_nodes)
    own = {n: n.meta["val"] for n in operands if _is_misaligned(n, device)}
    for node, value in own.items():
        _, T, width = value.shape
        row = padded_row(width, value.dtype)
        node.meta["val"] = value.as_strided(value.shape, (T * row, row, 1))
    try:
        yield list(own)
    finally:
        for node, value in own.items():
            node.meta["val"] = value


def _is_misaligned(node: fx.Node, device: str) -> bool:
    value = node.meta["val"]
    if node.op != "call_function" or value.ndim != 3 or value.element_size() != 2 or value.device.type != device:
        return False
    if not is_static(value) or not value.is_contiguous():
        return False
    width = value.shape[2]
    return width % 8 != 0 and padded_row(width, value.dtype) != width and tuning.has_tma(value.device)
