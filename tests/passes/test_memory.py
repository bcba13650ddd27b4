"""How much memory a graph's values are said to take, and for how long."""

import operator

import pytest
import torch
from torch import fx

from flashdp_compile.kernels import FAMILIES
from flashdp_compile.passes.late.memory import Memory

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


def test_a_value_is_held_until_another_of_its_size_takes_its_place():
    """x [8, 8] and two products of it, each read at once; a larger value comes and goes between them, while the first
    waits for the second."""
    graph = fx.Graph()

    def add(rows: int, *operands: fx.Node) -> fx.Node:
        node = graph.call_function(aten.mm.default, operands) if operands else graph.placeholder("x")
        node.meta["val"] = torch.empty(rows, 8)
        return node

    x = add(8)
    first = add(100, x, x)
    results = [add(1, first, x), add(3, add(300, x, x), x)]
    second = add(100, x, x)
    graph.output((*results, add(2, second, x)))
    assert Memory(graph).peak(list(graph.nodes)) == 4 * 8 * (8 + 1 + 100 + 300 + 3)
    second.meta["val"] = torch.empty(101, 8)
    assert Memory(graph).peak(list(graph.nodes)) == 4 * 8 * (8 + 1 + 300 + 3)


@pytest.mark.parametrize("name, held", [("mul_3", False), ("primals_3", True), ("tangents_1", True), ("arg3_1", True)])
def test_what_is_the_callers_is_held_throughout(name, held):
    """A value that is read once, and a product of twice its size later: the parameters of a layer that is done leave no
    room, what the forward has saved for it does."""
    graph = fx.Graph()

    def add(rows: int, *operands: fx.Node) -> fx.Node:
        node = graph.call_function(aten.mm.default, operands) if operands else graph.placeholder("mul_1")
        node.meta["val"] = torch.empty(rows, 8)
        return node

    given = graph.placeholder(name)
    given.meta["val"] = torch.empty(100, 8)
    x = add(8)
    first = add(1, given, x)
    graph.output((first, add(1, add(200, x, x), x)))
    late = 8 + 1 + 200 + 1 + (100 if held else 0)
    assert Memory(graph).peak(list(graph.nodes)) == 4 * 8 * late


@pytest.mark.parametrize("read_by", [aten.neg.default, aten.mm.default])
def test_a_conversion_that_is_fused_leaves_what_it_converts(read_by):
    """x [8, 8] in bfloat16 and a product of it, converted to float32 before a larger value comes and goes, and read
    behind it: by what Inductor fuses with the conversion, or by a library."""
    graph = fx.Graph()

    def add(target, rows: int, *args, dtype=torch.bfloat16) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(rows, 8, dtype=dtype)
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 8, dtype=torch.bfloat16)
    made = add(aten.mm.default, 100, x, x)
    wide = add(torch.ops.prims.convert_element_type.default, 100, made, torch.float32, dtype=torch.float32)
    large = add(aten.mm.default, 3, add(aten.mm.default, 300, x, x), x)
    fused = read_by is aten.neg.default
    last = add(read_by, 90, *((wide,) if fused else (wide, x)))
    graph.output((large, add(aten.mm.default, 1, last, x)))
    assert Memory(graph).peak(list(graph.nodes)) == 2 * 8 * (8 + (100 if fused else 200) + 300 + 3)


def test_values_of_one_op_are_held_one_by_one():
    graph = fx.Graph()
    x = graph.placeholder("x")
    both = graph.call_function(FAMILIES["outer_store"].op.default, (x, x))
    product, norm = (graph.call_function(operator.getitem, (both, at)) for at in (0, 1))
    read = graph.call_function(aten.mm.default, (product, x))
    large = graph.call_function(aten.mm.default, (x, x))
    output = graph.output((norm, read, large))
    sizes = {x: 10, product: 1000, norm: 3, read: 20, large: 500}
    for node, size in sizes.items():
        node.meta["val"] = torch.empty(size)
    both.meta["val"] = (product.meta["val"], norm.meta["val"])
    memory = Memory(graph)
    assert memory.made(both) == 4 * 1003 and memory.bytes[both] == 0
    assert memory.peak(list(graph.nodes)) == 4 * (10 + 1000 + 3 + 20)
    assert memory.peak([x, (both, large), product, norm, read, output]) == 4 * (10 + 1000 + 3 + 500 + 20)
