"""How much memory a graph's values are said to take, and for how long."""

import pytest
import torch
from torch import fx

from flashdp_compile.passes.memory import Memory

aten = torch.ops.aten


def padded(width: int, padding: list[int]) -> fx.Graph:
    """A matrix that is made, padded, and read by a library."""
    graph = fx.Graph()

    def add(value: torch.Tensor, target=None, *args) -> fx.Node:
        node = graph.placeholder("x") if target is None else graph.call_function(target, args)
        node.meta["val"] = value
        return node

    x = add(torch.empty(8, 8, dtype=torch.bfloat16))
    made = add(torch.empty(8, width, dtype=torch.bfloat16), aten.mm.default, x, x)
    shape = (8 + sum(padding[2:]), width + sum(padding[:2]))
    wide = add(torch.empty(shape, dtype=torch.bfloat16), aten.constant_pad_nd.default, made, padding)
    product = add(torch.empty(8, 8, dtype=torch.bfloat16), aten.mm.default, wide, x)
    graph.output((product,))
    return graph


@pytest.mark.parametrize(
    "width, padding, copies",
    [
        (50257, [0, 7], False),  # rows of 50304 have the room
        (50257, [0, 7, 0, 0], False),
        (50257, [0, 64], True),
        (50257, [7, 0], True),
        (50257, [0, 7, 0, 1], True),
        (512, [0, 8], True),  # short rows have none
    ],
)
def test_columns_are_padded_in_place_where_rows_have_room(width, padding, copies):
    graph = padded(width, padding)
    small, made = 2 * 8 * 8, 2 * 8 * width
    copy = 2 * (8 + sum(padding[2:])) * (width + sum(padding[:2]))
    assert Memory(graph).peak(list(graph.nodes)) == (small + made + copy if copies else 2 * small + made)
