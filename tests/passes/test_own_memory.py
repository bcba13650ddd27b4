"""Writes into views get a copy to write into, and nothing else in the graph changes."""

import operator

import pytest
import torch
from torch import Tensor, fx

from flashdp_compile.compat import detect_fake_mode, trace
from flashdp_compile.passes.late import own_memory as module
from flashdp_compile.passes.late.own_memory import own_memory

aten = torch.ops.aten
INDEX = torch.tensor([0, 2, 2])


def graph_of(function) -> fx.GraphModule:
    """The graph over x [5, 3, 4] and rows [3, 4] in ops of aten."""
    return trace(function, (torch.randn(5, 3, 4), torch.randn(3, 4)))


def added(target: Tensor, x: Tensor) -> Tensor:
    return aten.index_put(target, [None, torch.arange(3)], x, True)


def copies(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is aten.clone.default]


SHARED = {
    "expanded": lambda x, rows: added(rows.tanh().expand(5, 3, 4), x),
    "expanded under another view": lambda x, rows: added(rows.tanh().expand(5, 3, 4).mT.mT, x),
    "a part of an expanded tensor": lambda x, rows: added(rows.tanh().expand(2, 5, 3, 4).split(1)[1][0], x),
    "windows that overlap": lambda x, rows: added(rows.tanh().flatten().unfold(0, 4, 1)[:3].expand(5, 3, 4), x),
    "a slice written": lambda x, rows: aten.slice_scatter(rows.tanh().expand(5, 3, 4), x[:, :2], 1, 0, 2),
    "added by scatter": lambda x, rows: aten.scatter_add(rows.tanh().expand(5, 3, 4), 1, (x > 9).long(), x),
}
OWN = {
    "a result": lambda x, rows: added(rows.tanh().expand(5, 3, 4).sin(), x),
    "zeros": lambda x, rows: added(torch.zeros(5, 3, 4), x),
    "a copy": lambda x, rows: added(rows.tanh().expand(5, 3, 4) * 2, x),
    "one of several results": lambda x, rows: added(aten.native_layer_norm(x, [4], None, None, 1e-5)[0], x),
    "an input": lambda x, rows: added(x, x.sin()),
    "a view that is only read": lambda x, rows: x + rows.tanh().expand(5, 3, 4),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_view_is_copied_before_it_is_written_into(name):
    x, rows = torch.randn(5, 3, 4), torch.randn(3, 4)
    module = graph_of(SHARED[name])
    assert own_memory(module.graph) == 1
    module.graph.lint()
    module.recompile()
    (copy,) = copies(module)
    assert copy.meta["val"].shape == (5, 3, 4) and copy.meta["val"].is_contiguous()
    (write,) = copy.users
    assert write.args[0] is copy
    torch.testing.assert_close(module(x, rows), SHARED[name](x, rows))
    assert own_memory(module.graph) == 0, "a second run finds nothing left to do"


@pytest.mark.parametrize("name", OWN)
def test_other_values_are_left_alone(name):
    module = graph_of(OWN[name])
    before = str(module.graph)
    assert own_memory(module.graph) == 0
    assert str(module.graph) == before


def test_strides_are_not_believed():
    """Inductor drops `+ 0` and leaves to the view the strides of the sum."""
    module = graph_of(SHARED["expanded"])
    expand = next(node for node in module.graph.nodes if node.target is aten.expand.default)
    with detect_fake_mode([expand.meta["val"]]):
        expand.meta["val"] = torch.empty(5, 3, 4)
    assert own_memory(module.graph) == 1


def test_what_is_no_op_of_torch_is_taken_for_a_view():
    graph = fx.Graph()
    x = graph.placeholder("x")
    with detect_fake_mode([n.meta["val"] for n in graph_of(OWN["zeros"]).graph.nodes if "val" in n.meta][:1]):
        x.meta["val"] = torch.empty(5, 3, 4)
    unknown = graph.call_function(operator.pos, (x,))
    unknown.meta["val"] = x.meta["val"]
    graph.output(graph.call_function(aten.index_put.default, (unknown, [None, x], x)))
    assert own_memory(graph) == 1


READS = frozenset("_amp_update_scale as_strided bernoulli copy detach resize squeeze unsqueeze".split())


def is_pointwise(name: str) -> bool:
    packet = getattr(aten, name)
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def test_what_inductor_writes_in_place_is_known():
    """Those of its lowerings that have a twin in place, but for pointwise ones, and those that it makes in place."""
    from torch._inductor import lowering
    from torch._inductor.fx_passes import reinplace

    names = {op._opname for op in lowering.lowerings if getattr(op, "namespace", None) == "aten"}
    twins = {name for name in names if f"{name}_" in names and not name.startswith("_foreach")}
    made = {op._opname for op in reinplace.inplaceable_ops if getattr(op, "namespace", None) == "aten"}
    found = {name for name in twins if not is_pointwise(name)} | made
    assert {"index_put", "scatter_add"} <= found <= module._WRITES | READS
