"""A layer made by samples and clipped with others: all members keep their weights, and samples are counted once."""

import dataclasses

import pytest
import torch
from corrupt import NOISY
from heads import BATCH, MECHANISMS, LanguageModel, TwoHeads, graph, outputs, taken, the_same
from pass_support import random_inputs
from torch import fx, nn

from flashdp_compile.compat import argument
from flashdp_compile.passes.groups import BoundsPlace
from flashdp_compile.passes.late import store_by_samples as module
from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.late.store_by_samples import store_by_samples
from flashdp_compile.passes.late.vectors import norm_vectors
from flashdp_compile.passes.order import behind, dependents
from flashdp_compile.runtime import clipping
from flashdp_compile.runtime.bounds import BoundScales
from flashdp_compile.runtime.part_runs import PartRuns

aten, flashdp = torch.ops.aten, torch.ops.flashdp
PART = {"*": "part"}  # one group


class Head(nn.Module):
    """The last norm and the logits of a language model: a part of one that is sharded."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm, self.logits = norm(16), nn.Linear(16, 800, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(x)).square().mean((1, 2))


def clips(of: fx.Graph) -> list[fx.Node]:
    return list(of.find_nodes(op="call_function", target=flashdp.clip_factors.default))


def store(of: fx.Graph) -> fx.Node:
    stores = of.find_nodes(op="call_function", target=flashdp.outer_store.default)
    return max(stores, key=lambda n: n.meta["val"][0].numel())


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_numbers_of_a_head_stay(name):
    of = graph(clipping=PART, model=Head(), mechanism=MECHANISMS[name], bound=1e6 if "within" in name else 0.5)
    before = Memory(of).peak(list(of.nodes))
    (node,) = taken(of)
    assert argument(node, "samples") < BATCH
    assert Memory(of).peak(list(of.nodes)) < 0.7 * before
    assert store_by_samples(of, "cpu") == 0


def test_the_weights_of_all_members_come_from_the_same_norms():
    of = graph(clipping=PART, model=Head(nn.LayerNorm))
    policy = [clip.args[1:] for clip in clips(of)]
    (node,) = taken(of)
    (clip,) = clips(of)
    assert clip.args[0].args == (node, 1)
    assert [clip.args[1:]] == policy and argument(clip, "counts")
    assert node.args[4:8] == clip.args[1:5]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_left_out_of_all_sums_and_counted_once(poison):
    of = graph(clipping=PART, model=Head(), mechanism=dataclasses.replace(NOISY, noise_multiplier=0.0))
    inputs = random_inputs(of)
    (tangent,) = [at for at, n in enumerate(of.find_nodes(op="placeholder")) if "tangents" in n.name]
    inputs[tangent][3] = poison
    clipping.reset_nonfinite()
    before = outputs(of, inputs)
    assert all(value.isfinite().all() for value in before)
    assert clipping.nonfinite_samples() == 1
    assert store_by_samples(of, "cpu") == 1
    the_same(of, before, inputs)
    assert clipping.nonfinite_samples() == 2
    clipping.reset_nonfinite()


@pytest.mark.parametrize("settings", [{"clipping": "flat"}, {"model": LanguageModel(bias=True)}], ids=["flat", "bias"])
def test_the_largest_layer_of_a_group(settings):
    of = graph(**settings)
    (node,) = taken(of)
    assert 800 in node.meta["val"][0].shape


def test_what_gains_little_stays_whole(monkeypatch):
    """More is asked of a layer that is clipped with others than of one by itself."""
    monkeypatch.setattr(module, "GAIN", 0.0)
    monkeypatch.setattr(module, "GAIN_IN_GROUP", 0.95)
    assert store_by_samples(graph(clipping="flat"), "cpu") == 0
    assert store_by_samples(graph(), "cpu") >= 1


def test_what_gains_little_beside_the_other_parts_of_a_model_stays_whole():
    of = graph(clipping=PART, model=Head())
    peak = Memory(of).peak(list(of.nodes))
    assert store_by_samples(of, "cpu", beside=int(peak / module.GAIN_IN_GROUP)) == 0
    assert store_by_samples(of, "cpu", beside=peak) == 1


def test_one_layer_of_a_group_is_enough(monkeypatch):
    monkeypatch.setattr(module, "GAIN", 0.0)
    monkeypatch.setattr(module, "GAIN_IN_GROUP", 0.0)
    monkeypatch.setattr(module, "LARGE", 0.0)
    of = graph(clipping="flat", model=TwoHeads())
    (node,) = taken(of)
    assert 800 in node.meta["val"][0].shape
    assert store_by_samples(of, "cpu") == 0


@pytest.mark.parametrize("beside", [0, 1 << 40], ids=["alone", "beside other graphs"])
def test_one_layer_of_each_group(monkeypatch, beside):
    """The first group counts for both, and its largest layer does not wait for the other's norms."""
    monkeypatch.setattr(module, "GAIN", 0.0)
    monkeypatch.setattr(module, "GAIN_IN_GROUP", 0.0)
    monkeypatch.setattr(module, "LARGE", 0.0)
    of = graph(clipping={"layers.*": "layers", "*": "heads"}, model=TwoHeads(), bound={"*": 0.5, "layers.*": 0.5})
    both = taken(of, 2, beside)
    shapes = [node.meta["val"][0].shape for node in both]
    assert sum(800 in shape for shape in shapes) == 1 and not any(600 in shape for shape in shapes)
    assert sum(bool(argument(clip, "counts")) for clip in clips(of)) == 1
    assert not {*both} & dependents(both)


def test_what_read_the_weights_before_comes_behind():
    """The sum of the head is put off; other members' sums, which run before it, are no reason to leave it whole."""
    of = graph(clipping="flat")
    nodes = list(of.nodes)
    sums = of.find_nodes(op="call_function", target=flashdp.product_sum.default)
    (total,) = (n for n in sums if 800 in n.meta["val"].shape)
    order = behind(nodes, len(nodes) - 2, {total}, dependents([total]))
    for node, following in zip(order, order[1:], strict=False):
        node.append(following)
    (node,) = taken(of)
    (clip,) = clips(of)
    order = list(of.nodes)
    assert order.index(node) < order.index(clip) < min(map(order.index, clip.users))


def test_norms_of_biases_and_scales_are_still_one_launch():
    of = graph(clipping=PART, model=Head(nn.LayerNorm))
    (node,) = taken(of)
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    assert norm_vectors(of, "cpu") == 2
    assert argument(node, "beside").target is flashdp.vector_sqnorms.default
    the_same(of, before, inputs)


@pytest.mark.parametrize("others, count", [("layers.3.*", 1), ("layers.0.*", 0)], ids=["by its own", "by all"])
def test_bounds_that_move(others, count):
    """The scale of the first group is there when the norms of all have been counted: its layers stay whole."""
    state = BoundScales()
    state.prepare({"head": 0.5, "rest": 0.7}, [[torch.zeros(1)], [torch.zeros(1)]])
    state.load([0.5, 2.0])
    moving = dataclasses.replace(NOISY, bounds=BoundsPlace(state.place, ("head", "rest")))
    groups, bounds = {"head.*": "head", others: "head", "*": "rest"}, {"head.*": 0.5, others: 0.5, "*": 0.7}
    of = graph(clipping=groups, model=LanguageModel(), mechanism=moving, bound=bounds)
    for node in taken(of, count):
        assert argument(node, "bound") == 0.5 and argument(node, "grad_scale") is not None


def test_norms_over_shares():
    """Where parts have one bound together, weights need more than the norms of one."""
    runs = PartRuns(shared=True)
    owed = dataclasses.replace(NOISY, noise_multiplier=0.0, owed=True, part_runs=runs.place)
    assert store_by_samples(graph(clipping=PART, model=Head(), mechanism=owed), "cpu") == 0


def test_norms_that_somebody_else_reads():
    of = graph(clipping=PART, model=Head())
    _, norms = sorted(store(of).users, key=lambda n: n.args[1])
    output = of.output_node()
    output.args = (tuple(norms if value is None else value for value in output.args[0]),)
    assert store_by_samples(of, "cpu") == 0


def test_norms_that_need_the_sum():
    of = graph(clipping=PART, model=Head())
    (clip,) = clips(of)
    (summed,) = of.find_nodes(op="call_function", target=flashdp.product_sum.default)
    total = clip.args[0]
    with of.inserting_before(clip):
        more = of.call_function(aten.select.int, (summed, 1, 0))
        added = of.call_function(aten.add.Tensor, (total, more))
    more.meta["val"] = added.meta["val"] = total.meta["val"]
    clip.args = (added, *clip.args[1:])
    assert module._read(store(of), "cpu") is None


def test_norms_of_another_precision():
    of = graph(clipping=PART, model=Head())
    (clip,) = clips(of)
    _, norms = sorted(store(of).users, key=lambda n: n.args[1])
    (other,) = (n for n in clip.args[0].all_input_nodes if n is not norms)
    other.meta["val"] = other.meta["val"].double()
    assert store_by_samples(of, "cpu") == 0
