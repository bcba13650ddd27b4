"""Norms and sums of several layers in one launch: what is grouped, in which windows, and that values stay."""

import operator

import pytest
import torch
from torch import fx

from flashdp_compile.kernels import hopper, tuning
from flashdp_compile.passes.late import group_layers as module
from flashdp_compile.passes.late.group_layers import group_layers

flashdp = torch.ops.flashdp


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """As if the CPU had descriptors, and two processors."""
    monkeypatch.setattr(tuning, "has_tma", lambda device: True)
    monkeypatch.setattr(tuning, "processors", lambda device: 2)
    monkeypatch.setattr(module, "LIMIT", 2.0)


def linears(widths, noise=True, flat=True):
    """(graph module, inputs): norms and clipped sums of linears with these widths, one after the other."""
    generator = torch.Generator().manual_seed(0)
    graph, inputs = fx.Graph(), []

    def add(value, target=None, *args, **kwargs):
        node = graph.placeholder(f"in{len(inputs)}") if target is None else graph.call_function(target, args, kwargs)
        if target is None:
            inputs.append(value)
        node.meta["val"] = value if target is None else target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    key = add(torch.tensor([3, 4]))
    pairs = [
        tuple(add(torch.randn(3, 6, n, generator=generator).bfloat16()) for n in (d, p))
        for d, p in zip(widths, widths[1:], strict=False)
    ]
    norms = [add(None, flashdp.gram_sqnorm.default, x, [g], [True]) for x, g in pairs]
    total = norms[0]
    for norm in norms[1:] if flat else []:
        total = add(None, torch.ops.aten.add.Tensor, total, norm)
    draw = {"key": key, "std": 0.5} if noise else {}
    sums = [
        add(
            None,
            flashdp.weighted_matmul.default,
            x,
            g,
            total if flat else norm,
            **(draw | {"stream": n} if noise else {}),
        )
        for n, ((x, g), norm) in enumerate(zip(pairs, norms, strict=True))
    ]
    graph.output(tuple(sums))
    return fx.GraphModule({}, graph), inputs


def stored(shapes):
    """(graph module, inputs): products and norms of linears [B, T, d] by [B, T, p], and a sum of each."""
    generator = torch.Generator().manual_seed(0)
    graph, inputs, results = fx.Graph(), [], []

    def add(target, *args):
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    for number, (B, T, d, p) in enumerate(shapes):
        for width in (d, p):
            inputs.append(torch.randn(B, T, width, generator=generator).bfloat16())
            graph.placeholder(f"in{len(inputs)}").meta["val"] = inputs[-1]
        made = add(flashdp.outer_store.default, *list(graph.nodes)[-2:])
        product, norm = (add(operator.getitem, made, at) for at in (0, 1))
        results += [norm, add(flashdp.product_sum.default, product, norm)] if number != 1 else [product]
    graph.output(tuple(results))
    return fx.GraphModule({}, graph), inputs


@pytest.mark.parametrize("B", [3, 1])
def test_products_stay(B, monkeypatch):
    """Layers of two shapes; one that is too small for the tiles stays as it is, as does one of rows with odd ends."""
    monkeypatch.setattr(hopper, "available", lambda device: True)
    fine, wide = (B, 40, 128, 256), (B, 70, 128, 512)
    gm, inputs = stored([fine, wide, fine, (B, 40, 32, 64), wide, (B, 40, 128, 258), fine])
    expected = gm(*inputs)
    assert group_layers(gm.graph, "cpu") == 4 + 3, "stores of five, and sums of those four of them that are summed"
    gm.graph.lint()
    gm.recompile()
    assert count(gm.graph, flashdp.product_sums.default) == 1 and count(gm.graph, flashdp.product_sum.default) == 2
    (together,) = gm.graph.find_nodes(op="call_function", target=flashdp.outer_stores.default)
    assert together.args[2] == [0, 1, 0, 1, 0] and count(gm.graph, flashdp.outer_store.default) == 2
    assert [tuple(t.shape) for t in together.meta["val"]] == [(3, B, 128, 256), (2, B, 128, 512), (5, B)]
    for got, value in zip(gm(*inputs), expected, strict=True):
        assert torch.equal(got, value)


def test_products_are_stored_layer_by_layer_on_other_devices():
    gm, _ = stored([(3, 40, 128, 256)] * 4)
    assert group_layers(gm.graph, "cpu") == 0
    assert count(gm.graph, flashdp.outer_store.default) == 4 and count(gm.graph, flashdp.outer_stores.default) == 0


def count(graph, op):
    return len(graph.find_nodes(op="call_function", target=op))


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_values_stay(flat, noise):
    gm, inputs = linears([8, 16, 8, 16, 24, 8, 32, 8, 16], noise, flat)
    expected = gm(*inputs)
    assert group_layers(gm.graph, "cpu") == 14
    gm.graph.lint()
    gm.recompile()
    assert count(gm.graph, flashdp.gram_sqnorms.default) == count(gm.graph, flashdp.weighted_matmuls.default) == 1
    assert count(gm.graph, flashdp.gram_sqnorm.default) == count(gm.graph, flashdp.weighted_matmul.default) == 0
    for got, value in zip(gm(*inputs), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-6)


def test_layers_that_descriptors_cannot_read_stay_alone():
    gm, _ = linears([8, 16, 9, 16, 8])
    assert group_layers(gm.graph, "cpu") == 2  # the norms, and the sums, of the first and the last


def test_other_devices_are_left_alone():
    gm, _ = linears([8, 16, 8])
    assert group_layers(gm.graph) == 0


def test_nothing_waits_where_memory_would_grow(monkeypatch):
    """Operands that somebody else frees early would be held to the end."""
    gm, _ = linears([8, 16, 8, 16], flat=False)
    monkeypatch.setattr(module, "LIMIT", 0.0)
    assert group_layers(gm.graph, "cpu") == 0
    assert count(gm.graph, flashdp.weighted_matmul.default) == 3
