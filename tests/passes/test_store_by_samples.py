"""Products that set the peak are made for a few samples at a time; nothing else changes, and what waits stays whole."""

import pytest
import torch
from heads import BATCH, MECHANISMS, LanguageModel, TwoHeads, graph, made, outputs, the_same
from pass_support import random_inputs
from torch import nn

from flashdp_compile.compat import argument
from flashdp_compile.passes.late import store_by_samples as module
from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.late.store_by_samples import store_by_samples
from flashdp_compile.passes.order import behind, dependents

flashdp = torch.ops.flashdp


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_numbers_of_a_head_stay(name):
    of = graph(mechanism=MECHANISMS[name], bound=1e6 if "within" in name else 0.5)  # what is clipped hides its scale
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    assert store_by_samples(of, "cpu") == 1
    of.lint()
    (node,) = made(of)
    assert argument(node, "samples") < BATCH
    the_same(of, before, inputs)
    assert store_by_samples(of, "cpu") == 0


class Wide(LanguageModel):
    """Whose checkpointed layers hold more in their backward than the head's sum takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 256, bias=False), nn.ReLU(), nn.Linear(256, 16, bias=False)) for _ in range(2)
        )


def test_what_was_put_off_no_longer_waits():
    """The head's release is behind all others and holds its operands; by samples it runs as soon as they are there."""
    of = graph(model=Wide())
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    stores = of.find_nodes(op="call_function", target=flashdp.outer_store.default)
    head = max(stores, key=lambda n: n.meta["val"][0].numel())
    nodes = list(of.nodes)
    order = behind(nodes, len(nodes) - 2, {head}, dependents([head]))
    for node, following in zip(order, order[1:], strict=False):
        node.append(following)
    high = Memory(of).peak(list(of.nodes))
    assert list(of.nodes).index(head) > max(list(of.nodes).index(n) for n in stores if n is not head)
    assert store_by_samples(of, "cpu") >= 1
    of.lint()
    order = list(of.nodes)
    (node,) = (n for n in made(of) if 800 in n.meta["val"][0].shape)
    assert order.index(node) < min(order.index(n) for n in (*stores, *made(of)) if n in order and n is not node)
    assert Memory(of).peak(list(of.nodes)) < high
    the_same(of, before, inputs)


def test_several_layers(monkeypatch):
    monkeypatch.setattr(module, "GAIN", 0.0)
    monkeypatch.setattr(module, "LARGE", 0.0)
    of = graph(model=TwoHeads())
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    assert store_by_samples(of, "cpu") >= 2
    of.lint()
    the_same(of, before, inputs)


def test_with_noise_in_the_sum():
    """As fuse_noise leaves it on a GPU."""
    of = graph()
    inputs = random_inputs(of)
    (total,) = (
        n for n in of.find_nodes(op="call_function", target=flashdp.product_sum.default) if 800 in n.meta["val"].shape
    )
    noised = next(n for n in dependents([total]) if n.target is flashdp.add_noise.default)
    before = outputs(of, inputs)
    _, key, stream, std = noised.args
    total.kwargs = {"key": key, "stream": stream, "std": std}
    for node in (total, *noised.all_input_nodes):
        if total in (node, *node.all_input_nodes):
            noised.prepend(node)
    noised.replace_all_uses_with(noised.args[0])
    of.erase_node(noised)
    assert store_by_samples(of, "cpu") == 1
    assert made(of)[0].args[-3:] == (key, stream, std)
    the_same(of, before, inputs)


@pytest.mark.parametrize("least", [1, 2, 4])
def test_parts_are_as_large_as_the_peak_allows(least, monkeypatch):
    """Here by a model of memory in which parts of so many samples are free."""
    of = graph()
    peak, layer = (
        Memory.peak,
        max(
            of.find_nodes(op="call_function", target=flashdp.outer_store.default),
            key=lambda n: n.meta["val"][0].numel(),
        ),
    )
    (product,) = (n for n in layer.users if n.args[1] == 0)

    def flat_below(self, order, without=frozenset()):
        free = product.meta["val"].numel() * 4 // BATCH * least
        self.bytes[product] = max(self.bytes[product], free) if product in self.bytes else 0
        return peak(self, order, without)

    monkeypatch.setattr(Memory, "peak", flat_below)
    monkeypatch.setattr(module, "GAIN", 0.0)
    assert store_by_samples(of, "cpu") == 1
    assert argument(made(of)[0], "samples") == least


def test_products_that_are_never_stored():
    of = graph(strategy="outer")
    assert store_by_samples(of, "cpu") == 0
    assert not made(of)


def test_the_layer_that_counts_for_all_stays_whole():
    """Nobody would read its weights any more, and what computes them would not count."""
    of = graph()
    for clip in of.find_nodes(op="call_function", target=flashdp.clip_factors.default):
        clip.args = (*clip.args[:5], True, None, *clip.args[7:])
    assert store_by_samples(of, "cpu") == 0


def test_small_products_stay_whole(monkeypatch):
    of = graph()
    monkeypatch.setattr(module, "LARGE", 1.0)
    assert store_by_samples(of, "cpu") == 0
    monkeypatch.setattr(module, "LARGE", 0.0)
    monkeypatch.setattr(module, "GAIN", 0.95)
    assert store_by_samples(of, "cpu") == 0


def test_other_devices_are_left_alone():
    assert store_by_samples(graph()) == 0
