"""Equal numbers, equal values."""

import torch
from corrupt import aten, flashdp
from torch import fx

from flashdp_compile.passes.values import Values


class TestValues:
    """Equal numbers, equal values."""

    @staticmethod
    def graph() -> tuple[fx.Graph, fx.Node]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.arange(24.0).reshape(12, 2)
        return graph, x

    def chains(self) -> tuple[fx.Graph, list[fx.Node]]:
        graph, x = self.graph()
        ends = []
        for first in (None, [1, 0]):
            for shape in ([3, 4, 2], [4, 3, 2], [2, 3, 4], [2, 4, 3], [6, 2, 2], [2, -1], [-1, 2], [12, 2], [24]):
                for last in (None, [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 1, 0]):
                    node = x if first is None else graph.call_function(aten.permute.default, (x, first))
                    node = graph.call_function(aten.reshape.default, (node, shape))
                    if last is not None and len(shape) == 3:
                        node = graph.call_function(aten.permute.default, (node, last))
                    if len(shape) == 3:
                        ends.append(graph.call_function(aten.unsqueeze.default, (node, 1)))
                    ends.append(node)
        graph.output(tuple(ends))
        for node in graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))
        return graph, ends

    def test_views_are_seen_through_and_never_mistaken(self):
        graph, ends = self.chains()
        values = Values(graph)
        seen_through = 0
        for a in ends:
            for b in ends:
                equal = a.meta["val"].shape == b.meta["val"].shape and torch.equal(a.meta["val"], b.meta["val"])
                if values[a] == values[b]:
                    assert equal, f"{a} and {b} are not the same"
                seen_through += equal and a is not b and values[a] == values[b]
        assert seen_through > 100

    def test_a_transposed_view_equals_a_view_of_the_transposed(self):
        graph, x = self.graph()
        flat = graph.call_function(aten.permute.default, (x, [1, 0]))
        parts = graph.call_function(aten.view.default, (flat, [2, 3, 4]))
        left = graph.call_function(aten.permute.default, (parts, [1, 2, 0]))
        right = graph.call_function(aten.view.default, (x, [3, 4, 2]))
        other = graph.call_function(aten.permute.default, (parts, [2, 1, 0]))
        values = Values(graph)
        assert values[left] == values[right] != values[other]

    def test_what_differs_by_call_stays_apart(self):
        graph, x = self.graph()
        pairs = {
            op: [graph.call_function(op, (x, *rest)) for _ in range(2)]
            for op, rest in {
                aten.tanh.default: (),
                aten.native_dropout.default: (0.5, True),
                aten.rand_like.default: (),
                aten.mul_.Tensor: (2.0,),
                flashdp.draw_key.default: (3,),
            }.items()
        }
        values = Values(graph)
        assert {op for op, (a, b) in pairs.items() if values[a] == values[b]} == {aten.tanh.default}

    def test_numbers_of_other_types_stay_apart(self):
        graph, x = self.graph()
        nodes = [graph.call_function(aten.mul.Tensor, (x, factor)) for factor in (1, 1.0, True, 2)]
        values = Values(graph)
        assert len({values[n] for n in nodes}) == 4
