"""Operands whose rows descriptors cannot read have the strides that Inductor pads to; see also test_on_paper."""

import pytest
import torch
from torch import fx

from flashdp_compile.kernels import tuning
from flashdp_compile.passes.late.align_rows import aligned_rows

flashdp = torch.ops.flashdp


def operand(width: int, dtype: torch.dtype, *, given: bool = False) -> tuple[fx.Graph, fx.Node]:
    """A stored product of an operand [2, 4, width] that is made in the graph, or given to it."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    g = y if given else graph.call_function(torch.ops.aten.neg.default, (y,))
    x.meta["val"] = torch.empty(2, 4, 16, dtype=dtype, device="meta")
    g.meta["val"] = torch.empty(2, 4, width, dtype=dtype, device="meta")
    graph.call_function(flashdp.outer_store.default, (x, g))
    return graph, g


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")


def test_rows_start_at_multiples_of_sixteen_bytes():
    graph, g = operand(50257, torch.bfloat16)
    with aligned_rows(graph, device="meta") as aligned:
        assert aligned == [g]
        assert g.meta["val"].shape == (2, 4, 50257)
        assert g.meta["val"].stride() == (4 * 50304, 50304, 1)


def test_operands_of_a_list_are_aligned_too():
    graph, g = operand(50257, torch.bfloat16)
    x = next(n for n in graph.nodes if n.name == "x")
    graph.call_function(flashdp.gram_sqnorm.default, ([x], [g, g]))
    with aligned_rows(graph, device="meta") as aligned:
        assert aligned == [g]


def test_an_operand_shares_its_memory_with_the_same_values_as_before():
    """By their storages Inductor tells which values a write in place would change."""
    graph, g = operand(50257, torch.bfloat16)
    own = g.meta["val"]
    view = own.view(8, 50257)
    with aligned_rows(graph, device="meta"):
        assert g.meta["val"].untyped_storage()._cdata == view.untyped_storage()._cdata
    assert g.meta["val"] is own


def test_operands_have_their_own_values_again_after_an_error():
    graph, g = operand(50257, torch.bfloat16)
    own = g.meta["val"]
    with pytest.raises(ZeroDivisionError), aligned_rows(graph, device="meta"):
        raise ZeroDivisionError
    assert g.meta["val"] is own


@pytest.mark.parametrize(
    "width, dtype, given",
    [
        (50304, torch.bfloat16, False),  # already aligned
        (50257, torch.float32, False),  # no descriptor for 32 bits
        (50257, torch.bfloat16, True),  # made elsewhere: a copy would be needed
        (257, torch.bfloat16, False),  # Inductor leaves short rows as they are
    ],
)
def test_other_operands_are_left_alone(width, dtype, given):
    graph, g = operand(width, dtype, given=given)
    own = g.meta["val"]
    with aligned_rows(graph, device="meta") as aligned:
        assert not aligned and g.meta["val"] is own


def test_other_devices_are_left_alone():
    graph, _ = operand(50257, torch.bfloat16)
    with aligned_rows(graph, device="cuda") as aligned:
        assert not aligned
