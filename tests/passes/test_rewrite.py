"""The rewritten graph: every strategy gives the same release, and nothing else of the graph changes."""

import copy

import pytest
import torch
from pass_support import SILENT, random_inputs, rewritten, run
from small_models import Block, Conv1D, Tied, TimeMajorAttention, TwoStreams, convolution, padded, twice
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from flashdp_compile.errors import Refusal
from flashdp_compile.passes.groups import Group
from flashdp_compile.passes.mechanism import Mechanism
from flashdp_compile.passes.rewrite import rewrite_empty, rewrite_single
from flashdp_compile.passes.strategies.catalogue import NAMES
from flashdp_compile.testing import joint_graph
from zoo import Model

NOISY = Mechanism(noise_multiplier=1.0, clip_fn="hard", mean=False, expected_batch_size=None, seed=3)
TOKENS = torch.randint(0, 2, (3, 4))


def doubled(*tensors):
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


MODELS = {
    "linear": (lambda: nn.Linear(6, 5), (torch.randn(3, 4, 6),), {}),
    "conv1d": (lambda: Conv1D(6, 5), (torch.randn(3, 4, 6),), {}),
    "block": (Block, (torch.randn(3, 4, 6),), {}),
    "twice": (twice, (torch.randn(3, 6),), {}),
    "padded": (padded, (TOKENS,), {}),
    "tied": (Tied, (TOKENS,), {}),
    "time_major": (TimeMajorAttention, (torch.randn(4, 3, 6),), {"batch_dim": 1}),
    "outer": (TwoStreams, (torch.randn(3, 6), torch.randn(3, 6)), {}),
    "convolution": (convolution, (torch.randn(3, 2, 5, 5),), {}),
}


def release(name: str, strategy: str, clipping: str, bound: float, mechanism: Mechanism = SILENT):
    """(outputs before, outputs after, positions of the gradients)"""
    build, args, options = MODELS[name]
    torch.manual_seed(1)
    model, args = build().double(), doubled(*args)
    before = joint_graph(model, *args, **options)
    inputs = random_inputs(before.graph)
    plain = run(before.graph, inputs)
    found = rewritten(model, *args, strategy=strategy, clipping=clipping, bound=bound, mechanism=mechanism, **options)
    found.joint.graph.lint()
    found.verify()
    return plain, run(found.joint.graph, inputs), {g.name: g.gradient.position for g in found.gradients}


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_gives_the_same_release(name, clipping):
    plain, expected, places = release(name, "materialize", clipping, 0.7)
    for strategy in ("gram", "outer", "store", "auto"):
        _, found, _ = release(name, strategy, clipping, 0.7)
        for parameter, i in places.items():
            torch.testing.assert_close(found[i], expected[i], rtol=1e-6, atol=1e-9, msg=f"{strategy}: {parameter}")
    assert any((expected[i] - plain[i]).abs().max() > 1e-3 for i in places.values()), "nothing was clipped"


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_without_a_bound_it_is_the_plain_gradient(name, strategy):
    plain, found, places = release(name, strategy, "flat", 1e30)
    for i, (before, after) in enumerate(zip(plain, found, strict=True)):
        if i in places.values():
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-9)
        elif before is not None:
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_clipped_sum_by_hand():
    """y = x w with tangent t: sample b's gradient is x_b t_b^T; its norm |x_b| |t_b|."""
    model, x = nn.Linear(3, 2, bias=False).double(), torch.randn(4, 3).double()
    found = rewritten(model, x, bound=0.9)
    inputs = random_inputs(found.joint.graph)
    names = [n.name for n in found.joint.graph.nodes if n.op == "placeholder"]
    values = dict(zip(names, inputs, strict=True))
    x, t = (values[next(iter(nodes)).name] for nodes in (found.joint.samples, found.joint.tangents))
    own = t.unsqueeze(2) * x.unsqueeze(1)
    weights = (0.9 / own.flatten(1).norm(dim=1)).clamp(max=1)
    assert (weights < 1).any()
    released = run(found.joint.graph, inputs)[found.position("weight")]
    torch.testing.assert_close(released, (weights.view(-1, 1, 1) * own).sum(0), rtol=1e-5, atol=1e-6)


def test_nothing_but_gradients_changes():
    """Forward outputs and gradients of samples are the same nodes as before."""
    x = torch.randn(3, 4, 6, requires_grad=True)
    found = rewritten(Block(), x, mechanism=NOISY)
    assert found.before.kept and len(found.before.kept) + len(found.gradients) == len(found.joint.output.args[0])
    for position, node in found.before.kept.items():
        assert found.joint.output.args[0][position] is node
    found.verify()


def test_a_sample_that_is_not_finite_adds_nothing():
    for strategy in ("gram", "outer", "store", "materialize"):
        found = rewritten(nn.Linear(6, 5), torch.randn(3, 6), strategy=strategy)
        (samples,) = found.joint.samples
        inputs = random_inputs(found.joint.graph)
        at = [n for n in found.joint.graph.nodes if n.op == "placeholder"].index(samples)
        inputs[at][1] = float("inf")
        with_bad = run(found.joint.graph, inputs)
        assert all(with_bad[found.position(n)].isfinite().all() for n in ("weight", "bias")), strategy


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {n: i for i, n in enumerate(graph.nodes)}


def originals(model, *args) -> set[str]:
    return {n.name for n in joint_graph(model, *args).graph.nodes}


class TestKey:
    def test_it_is_on_the_device_of_the_gradients(self):
        """Wherever the model's outputs end up; "meta" stands for another device."""
        model = Model(lambda m, x: m.fc(x).to("meta"), fc=nn.Linear(6, 5))
        found = rewritten(model, torch.randn(3, 6), mechanism=NOISY)
        (key,) = found.joint.graph.find_nodes(op="call_function", target=torch.ops.flashdp.draw_key.default)
        assert key.meta["val"].device == found.result("fc.weight").meta["val"].device
        found.verify()

    def test_gradients_on_several_devices_are_refused(self):
        model = Model(lambda m, x: m.b(m.a(x).to("meta")), a=nn.Linear(6, 5), b=nn.Linear(5, 4).to("meta"))
        with pytest.raises(Refusal, match="the parameters are on several devices"):
            rewritten(model, torch.randn(3, 6), mechanism=NOISY)


class TestOrder:
    """settle(): every added node right behind the last value that it needs, of the backward none in front of it."""

    @pytest.mark.parametrize("clipping", ["flat", "per_layer"])
    @pytest.mark.parametrize("strategy", ["gram", "materialize"])
    def test_added_nodes_stand_behind_their_last_operand(self, clipping, strategy):
        model, x = (
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)),
            torch.randn(3, 6),
        )
        before = originals(model, x)
        found = rewritten(model, x, clipping=clipping, strategy=strategy, mechanism=NOISY)
        found.joint.graph.lint()
        place = positions(found.joint.graph)
        order = list(found.joint.graph.nodes)
        inputs_end = max(place[n] for n in order if n.op == "placeholder")
        added = [n for n in order if n.op == "call_function" and n.name not in before]
        assert len(added) > 10
        tangents = set(found.joint.tangents)
        own = (n for n in order if n.name in before and tangents.intersection(n.all_input_nodes))
        backward = min(map(place.__getitem__, own))
        for node in added:
            latest = max([inputs_end, *(place[n] for n in node.all_input_nodes)])
            assert latest < place[node]
            if tangents.intersection(node.all_input_nodes):
                latest = max(latest, max(n for n in range(backward) if order[n].name in before))
            between = [n for n in order[latest + 1 : place[node]] if n.name in before]
            assert not between, f"{node} waits behind {between}"

    def test_nothing_is_recomputed_before_it_is_needed(self):
        """Torch puts recomputed nodes off only behind the first user of a tangent: an early one keeps all alive."""
        block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model = Model(
            lambda m, x: checkpoint(m.b, checkpoint(m.a, x, use_reentrant=False), use_reentrant=False).sin(),
            a=block,
            b=copy.deepcopy(block),
        )
        found = rewritten(model, torch.randn(3, 6), mechanism=NOISY)
        order = list(found.joint.graph.nodes)
        tangents = set(found.joint.tangents)
        first = min(n for n, node in enumerate(order) if tangents.intersection(node.all_input_nodes))
        layers = [n for n, node in enumerate(order) if node.target is torch.ops.aten.addmm.default]
        assert len(layers) == 4 and max(layers) < first

    def test_per_layer_finishes_each_layer_at_once(self):
        model, x = (
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)),
            torch.randn(3, 6),
        )
        found = rewritten(model, x, clipping="per_layer")
        place = positions(found.joint.graph)
        last, middle, first = (place[found.result(f"{i}.weight")] for i in (4, 2, 0))
        weights = sorted(place[n] for n in place if n.target is torch.ops.flashdp.clip_factors.default)
        assert len(weights) == 3
        assert last < middle < first
        assert last < weights[1] and middle < weights[2]

    def test_flat_waits_for_the_last_norm(self):
        found = rewritten(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), torch.randn(3, 6))
        place = positions(found.joint.graph)
        (weights,) = [place[n] for n in place if n.target is torch.ops.flashdp.clip_factors.default]
        assert all(place[found.result(g.name)] > weights for g in found.gradients)


class TestNoise:
    def test_one_key_and_a_stream_for_every_parameter(self):
        found = rewritten(Block(), torch.randn(3, 4, 6), mechanism=NOISY, bound=2.0)
        noise = [found.result(g.name) for g in found.gradients]
        assert all(n.target is torch.ops.flashdp.add_noise.default for n in noise)
        assert len({n.args[1] for n in noise}) == 1
        assert sorted(n.args[2] for n in noise) == list(range(len(noise)))
        assert [n.args[3] for n in noise] == pytest.approx([2.0 * (1 + found.plan.slack)] * len(noise))

    @pytest.mark.parametrize("clipping", ["flat", "per_layer"])
    def test_the_deviation_is_sigma_times_sensitivity_over_the_divisor(self, clipping):
        mechanism = Mechanism(1.5, "hard", True, 64, None)
        found = rewritten(Block(), torch.randn(3, 4, 6), mechanism=mechanism, clipping=clipping, bound=2.0)
        (std,) = {found.result(g.name).args[3] for g in found.gradients}
        assert std == pytest.approx(1.5 * 2.0 * (1 + found.plan.slack) / 64)

    def test_over_the_size_of_the_batch(self):
        mechanism = Mechanism(1.0, "hard", True, None, None)
        assert mechanism.divides_by_batch and not NOISY.divides_by_batch
        found = rewritten(Block(), torch.randn(4, 2, 6), mechanism=mechanism)
        (std,) = {found.result(g.name).args[3] for g in found.gradients}
        assert std == pytest.approx((1 + found.plan.slack) / 4)

    def test_noise_is_what_the_outputs_differ_by(self):
        _, silent, places = release("block", "gram", "flat", 1.0)
        _, noisy, _ = release("block", "gram", "flat", 1.0, NOISY)
        for i in range(len(silent)):
            if silent[i] is not None:
                assert ((silent[i] - noisy[i]).abs().max() > 0.01) == (i in places.values())


class TestWholeBatches:
    """B = 1 and B = 0 need no proof."""

    def test_one_sample(self):
        joint = joint_graph(nn.Linear(6, 5).double(), torch.randn(1, 6).double())
        places = {g.name: g.position for g in joint.gradients}
        inputs = random_inputs(joint.graph)
        plain = run(joint.graph, inputs)
        rewrite_single(joint, (Group("all", 0.5, tuple(places)),), SILENT)
        found = run(joint.graph, inputs)
        norm = torch.cat([plain[i].flatten() for i in places.values()]).norm()
        assert norm > 0.5
        for i in places.values():
            torch.testing.assert_close(found[i], plain[i] * 0.5 / norm, rtol=1e-6, atol=1e-9)

    def test_no_sample(self):
        joint = joint_graph(nn.Linear(6, 5), torch.randn(0, 6))
        assert joint.batch == 0
        places = [g.position for g in joint.gradients]
        rewrite_empty(joint, (Group("all", 1.0, ("weight", "bias")),), NOISY)
        found = run(joint.graph, random_inputs(joint.graph))
        assert all(0.01 < found[i].abs().max() < 10 for i in places)

    def test_no_sample_without_noise_is_zero(self):
        joint = joint_graph(nn.Linear(6, 5), torch.randn(0, 6))
        rewrite_empty(joint, (Group("all", 1.0, ("weight", "bias")),), SILENT)
        found = run(joint.graph, random_inputs(joint.graph))
        assert all((found[g.position] == 0).all() for g in joint.gradients)
