"""Releases of large layers move behind the layers whose activations are freed in the meantime; nothing else changes."""

import pytest
import torch
from corrupt import NOISY
from pass_support import random_inputs, rewritten, run
from torch import fx, nn

from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.late.release_late import release_late
from flashdp_compile.runtime import noise

STORE = torch.ops.flashdp.outer_store.default


class LanguageModel(nn.Module):
    """Layers of one width, and a head whose products [B, 16, 800] are larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.head = nn.Linear(16, 800, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x).square().mean((1, 2))


def graph(clipping: str, **settings: object) -> fx.Graph:
    found = rewritten(
        LanguageModel(), torch.randn(4, 96, 16), strategy="store", clipping=clipping, mechanism=NOISY, **settings
    )
    return found.joint.graph


def outputs(of: fx.Graph, inputs: list[object]) -> list[torch.Tensor]:
    noise.KEYS.reset()  # the same key for every run: the mechanism has a seed
    return [value for value in run(of, inputs) if isinstance(value, torch.Tensor)]


def peak(of: fx.Graph) -> int:
    return Memory(of).peak(list(of.nodes))


def stores(of: fx.Graph) -> list[int]:
    """The widths of the products, in the order in which they are stored."""
    return [n.meta["val"][0].numel() for n in of.nodes if n.target is STORE]


@pytest.mark.parametrize("clipping", ["per_layer", "flat"])
def test_the_numbers_stay_what_they_were(clipping):
    of = graph(clipping)
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    release_late(of)
    of.lint()
    for was, now in zip(before, outputs(of, inputs), strict=True):
        assert torch.equal(was, now)


def test_the_head_comes_later_and_the_peak_is_lower():
    of = graph("per_layer")
    head = 4 * 16 * 800
    assert stores(of)[0] == head
    high = peak(of)
    assert release_late(of) == 1
    assert stores(of).index(head) > 0
    assert peak(of) < 0.95 * high
    assert release_late(of) == 0, "where it is best already"


def test_small_layers_stay_where_they_are(monkeypatch):
    of = graph("per_layer")
    monkeypatch.setattr("flashdp_compile.passes.late.release_late.LARGE", 1.0)
    order = [str(n) for n in of.nodes]
    assert release_late(of) == 0
    assert [str(n) for n in of.nodes] == order


def test_memory_is_held_from_the_maker_to_the_last_reader():
    """x [8] is given; its product with itself (8), a view of it, and the product of that (8)."""
    of = fx.Graph()
    x = of.placeholder("x")
    a = of.call_function(torch.ops.aten.mm.default, (x, x))
    view = of.call_function(torch.ops.aten.view.default, (a, [2, 4]))
    fused = of.call_function(torch.ops.aten.neg.default, (view,))
    b = of.call_function(torch.ops.aten.mm.default, (view, view))
    of.output((b,))
    for node in (x, a, view, fused, b):
        node.meta["val"] = torch.empty(8)
    assert Memory(of).peak(list(of.nodes)) == 2 * 8 * 4
    assert Memory(of).bytes[view] == Memory(of).bytes[fused] == 0


def test_sizes_that_are_symbols_leave_the_order():
    x = torch.randn(4, 96, 16)
    of = rewritten(LanguageModel(), x, dynamic=True, strategy="store", clipping="per_layer").joint.graph
    assert release_late(of) == 0
