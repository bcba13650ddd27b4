"""Windows of layers: which nodes share a launch, and which would hold too much memory."""

import torch
from torch import fx

from flashdp_compile.passes.late import windows
from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.late.windows import Fitting, fullest
from flashdp_compile.passes.order import behind

mm = torch.ops.aten.mm.default


def halves() -> tuple[fx.Graph, list[fx.Node]]:
    """Four products, each read at once; a value as large as two of them is held while the first two are made."""
    graph = fx.Graph()

    def add(rows: int, columns: int, *operands: fx.Node) -> fx.Node:
        node = graph.call_function(mm, operands) if operands else graph.placeholder("x")
        node.meta["val"] = torch.empty(rows, columns)
        return node

    x = add(64, 64)
    held = add(128, 64, x, x)
    products, results = [], []
    for number in range(4):
        products.append(add(64, 64, x, x))
        results.append(add(64, 1, products[-1], x))
        if number == 1:
            results.append(add(1, 1, held, x))
    graph.output(tuple(results))
    return graph, products


def test_layers_wait_only_where_there_is_memory(monkeypatch):
    monkeypatch.setattr(windows, "ROUNDS", ((9, 6),))
    graph, products = halves()
    peak = Memory(graph).peak(list(graph.nodes))
    assert Fitting(graph, peak).windows(products, lambda n: 3, 1, 1) == [products[2:]]
    assert Fitting(graph, 2 * peak).windows(products, lambda n: 3, 1, 1) == [products[:2], products[2:]]
    assert Fitting(graph, peak / 2).windows(products, lambda n: 3, 1, 1) == []


def test_a_peak_that_is_there_anyway_is_left_and_not_added_to(monkeypatch):
    """Below the limit the last two may wait, though the first two are above it by themselves: a little, or much."""
    monkeypatch.setattr(windows, "ROUNDS", ((9, 6),))
    graph, products = halves()
    peak, last = Memory(graph).peak(list(graph.nodes)), 64 * 64 * 4 * 3 + 4 * 4 * 64 + 4
    assert last < 0.95 * peak
    for limit in (0.95 * peak, last):
        assert Fitting(graph, limit).windows(products, lambda n: 3, 1, 1) == [products[2:]]


def test_what_one_launch_makes_is_held_at_once(monkeypatch):
    """The results of the last two come from one launch as well, and both products are held for both."""
    monkeypatch.setattr(windows, "ROUNDS", ((9, 6),))
    graph, products = halves()
    for product in products[2:]:
        (reader,) = product.users
        reader.meta["val"] = torch.empty(64, 64)
    limit = Memory(graph).peak(list(graph.nodes))
    assert Fitting(graph, limit).windows(products, lambda n: 3, 1, 1) == [products[2:]]
    assert Fitting(graph, limit, then=mm).windows(products, lambda n: 3, 1, 1) == []


def test_what_runs_at_once_moves_with_one_of_its_nodes():
    """A launch of several sums waits for a window that only one of them reads."""
    graph, products = halves()
    x, held, first, read, second, *rest = graph.nodes
    order = [x, held, first, (read, second), *rest]
    assert behind(order, order.index(rest[0]), [first], {read}) == [x, held, rest[0], first, (read, second), *rest[1:]]


def test_a_layer_does_not_wait_for_what_reads_it():
    graph, products = halves()
    (reader,) = products[0].users
    assert Fitting(graph, 1e9).windows([products[0], reader], lambda n: 1, 1, 132) == []


def test_windows_fill_whole_rounds_and_leave_large_layers_alone():
    tiles = [18, 72, 1182, 54, 72] * 8
    windows = fullest(list(range(40)), tiles, 3 * 132, 8 * 132, 132)
    sizes = [sum(tiles[at] for at in window) for window in windows]
    assert sorted(at for window in windows for at in window) == [at for at in range(40) if tiles[at] < 1000]
    assert max(sizes) <= 8 * 132
    assert sum(-(-size // 132) for size in sizes) == -(-sum(sizes) // 132), "no window wastes a round"
    assert fullest(["a", "b"], [1, 2], 396, 1056, 132) == [["a", "b"]]
    assert fullest(["a"], [1], 396, 1056, 132) == []
