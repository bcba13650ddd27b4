"""Several clipping groups in one launch: which wait for each other, and that values and the count stay."""

import operator

import pytest
import torch
from corrupt import NOISY
from pass_support import SILENT, random_inputs, rewritten, run
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from flashdp_compile.kernels import tuning
from flashdp_compile.passes.late import clip_groups as module, group_layers as grouped
from flashdp_compile.passes.late.clip_groups import clip_groups
from flashdp_compile.passes.late.fuse_noise import fuse_noise
from flashdp_compile.passes.late.group_layers import group_layers
from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.late.vectors import norm_vectors, sum_vectors
from flashdp_compile.passes.mechanism import Mechanism
from flashdp_compile.passes.strategies.catalogue import NAMES
from flashdp_compile.runtime import clipping, noise

aten, flashdp = torch.ops.aten, torch.ops.flashdp
DRAWN = torch.tensor([3, 4])


class Layers(nn.Module):
    """So many times a norm with and one without a bias, and a linear layer; widths that descriptors can read."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(count))
        self.scales = nn.ModuleList(nn.RMSNorm(8) for _ in range(count))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x):
        for norm, scale, linear in zip(self.norms, self.scales, self.linears, strict=True):
            x = x + linear(scale(norm(x).tanh()))
        return x


def layers(count=3, strategy="gram", mechanism=NOISY, clipping="per_layer", dtype=torch.float32, **options):
    x, model = torch.randn(3, 6, 8, dtype=dtype), Layers(count).to(dtype)
    return rewritten(model, x, strategy=strategy, clipping=clipping, mechanism=mechanism, **options).joint.graph


def waiting(graph):
    """What the last pass does before groups are clipped together."""
    fuse_noise(graph, "cpu")
    sum_vectors(graph, "cpu")
    group_layers(graph, "cpu")
    return graph


def count(graph, op):
    return len(graph.find_nodes(op="call_function", target=op.default))


def outputs(of, inputs):
    noise.KEYS.reset()  # the same key for every run: the mechanism has a seed
    return [value for value in run(of, inputs) if isinstance(value, torch.Tensor)]


def close(graph, inputs, expected, tolerance=1e-5):
    for got, value in zip(outputs(graph, inputs), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance / 10, equal_nan=True)


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("fn", ["hard", "automatic", "normalize"])
def test_values_stay(strategy, fn):
    mechanism = Mechanism(noise_multiplier=0.5, clip_fn=fn, mean=True, expected_batch_size=7, seed=3)
    of = waiting(layers(strategy=strategy, mechanism=mechanism))
    inputs = random_inputs(of)
    expected, groups = outputs(of, inputs), count(of, flashdp.clip_factors)
    done = clip_groups(of, "cpu")
    of.lint()
    assert done >= 5, "the norms; the first of them counts"
    assert count(of, flashdp.group_weights) == 1
    assert count(of, flashdp.clip_factors) == groups - done
    close(of, inputs, expected)


def test_layers_of_one_launch_are_clipped_together(monkeypatch):
    """As if the CPU had descriptors: the sums of the linears share a launch, which waits for all of their weights."""
    monkeypatch.setattr(tuning, "has_tma", lambda device: True)
    monkeypatch.setattr(tuning, "processors", lambda device: 2)
    monkeypatch.setattr(grouped, "LIMIT", 2.0)
    of = waiting(layers(4, dtype=torch.bfloat16))
    sums = of.find_nodes(op="call_function", target=flashdp.weighted_matmuls.default)
    inputs = random_inputs(of)
    expected = outputs(of, inputs)
    clip_groups(of, "cpu")
    close(of, inputs, expected, tolerance=2.0**-7)  # of gradients in bfloat16
    together = of.find_nodes(op="call_function", target=flashdp.group_weights.default)
    assert len(sums) == 1 and len(together) == 2
    for reader in sums:
        makers = {weight.args[0].args[0] for weight in reader.args[2]}
        assert len(makers) == 1 and makers <= set(together)


def test_nothing_is_held_for_longer():
    """A layer whose sum is a launch of its own is clipped where it was, and the peak is what it was."""
    of = waiting(layers(4))
    alone = {n: list(n.users) for n in of.find_nodes(op="call_function", target=flashdp.weighted_matmul.default)}
    assert len(alone) == 4
    peak = Memory(of).peak(list(of.nodes))
    clip_groups(of, "cpu")
    (together,) = of.find_nodes(op="call_function", target=flashdp.group_weights.default)
    order = {node: at for at, node in enumerate(of.nodes)}
    for layer in alone:
        assert layer.args[2].target is flashdp.clip_factors.default
        assert order[layer] < order[together]
    assert Memory(of).peak(list(of.nodes)) <= peak


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_is_counted_once(bad):
    of = waiting(layers())
    inputs = random_inputs(of)
    at = next(n for n, value in enumerate(inputs) if isinstance(value, torch.Tensor) and value.shape == (3, 6, 8))
    inputs[at][1, 2, 3] = bad
    clipping.reset_nonfinite()
    expected = outputs(of, inputs)
    assert clipping.nonfinite_samples() == 1
    clip_groups(of, "cpu")
    close(of, inputs, expected)
    assert clipping.nonfinite_samples() == 2


def test_the_count_reads_the_norms_of_a_launch_as_a_whole():
    of = waiting(layers())
    before = len(of.find_nodes(op="call_function", target=aten.unsqueeze.default))
    done = clip_groups(of, "cpu")
    after = len(of.find_nodes(op="call_function", target=aten.unsqueeze.default))
    assert before - after == done
    (join,) = of.find_nodes(op="call_function", target=aten.cat.default)
    assert [n.target for n in join.args[0]].count(aten.permute.default) == 1
    assert join.meta["val"].shape == (3, 8)


@pytest.mark.parametrize("at_once", [3, 5])
def test_launches_have_so_many_operands(at_once, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    of = waiting(layers())
    inputs = random_inputs(of)
    expected = outputs(of, inputs)
    clip_groups(of, "cpu")
    found = of.find_nodes(op="call_function", target=flashdp.group_weights.default)
    assert found and all(len(n.args[0]) + len(n.args[1]) <= at_once for n in found)
    close(of, inputs, expected)


@pytest.mark.parametrize("clipping", ["flat", {"norms.*": "a", "scales.*": "a", "linears.*": "b"}])
def test_what_counts_is_left_alone(clipping):
    """One group for all counts; of two, one does, and the other is alone."""
    of = waiting(layers(clipping=clipping))
    assert clip_groups(of, "cpu") == 0
    assert count(of, flashdp.clip_factors) == (1 if clipping == "flat" else 2)
    assert norm_vectors(of, "cpu") >= 8


def test_without_a_launch_that_waits_nothing_does():
    """No noise, no vector_sums: every sum is Inductor's own, as soon as its weights are there."""
    of = waiting(layers(strategy="outer", mechanism=SILENT))
    assert count(of, flashdp.vector_sums) == 0
    assert clip_groups(of, "cpu") == 0


def test_other_devices_and_sizes_that_are_symbols_are_left_alone():
    of = waiting(layers())
    before = [str(n) for n in of.nodes]
    assert clip_groups(of) == 0 and [str(n) for n in of.nodes] == before
    of = waiting(layers(dynamic=True))
    assert clip_groups(of, "cpu") == 0


def made(weigh, *vectors):
    """A graph in which `weigh` makes weights of vectors, and one launch sums a vector with each of them."""

    def step(key, *vectors):
        weights = weigh(*vectors)
        values = [torch.ones(3, 4)] * len(weights)
        return flashdp.vector_sums(values, weights, key, list(range(len(weights))), 0.5)

    return make_fx(step, tracing_mode="fake")(DRAWN, *vectors).graph


def check_made(weigh, vectors, done):
    of = made(weigh, *vectors)
    expected = run(of, [DRAWN, *vectors])
    assert clip_groups(of, "cpu") == done
    of.lint()
    for got, value in zip(run(of, [DRAWN, *vectors]), expected, strict=True):
        torch.testing.assert_close(got, value)
    return of


def test_bounds_may_differ_and_rules_may_not():
    def weigh(*vectors):
        a, b, c, d = (v.square().sum(1) for v in vectors)
        rule = "hard", False, None, False
        return [
            flashdp.clip_factors(a, 0.5, *rule),
            flashdp.clip_factors(b + c, 0.25, *rule),
            flashdp.clip_factors(d, 0.5, "normalize", *rule[1:]),
        ]

    of = check_made(weigh, [torch.randn(3, n) for n in (4, 7, 5, 6)], 2)
    (together,) = of.find_nodes(op="call_function", target=flashdp.group_weights.default)
    assert together.args[2:] == ([1, 2], [0, 0], [0.5, 0.25], "hard", False, None)


def test_a_norm_may_belong_to_two_groups():
    """As no rewrite makes it: the sum of one group is a part of another's."""

    def weigh(*vectors):
        a, b = (v.square().sum(1) for v in vectors)
        total = a + b
        rule = "hard", False, None, False
        return [flashdp.clip_factors(t, 0.5, *rule) for t in (total, total + a, a)]

    check_made(weigh, [torch.randn(3, n) for n in (4, 7)], 3)


def test_long_vectors_and_other_dtypes_are_norms_or_left_alone(monkeypatch):
    monkeypatch.setattr("flashdp_compile.passes.late.norms.LONG", 6)

    def weigh(*vectors):
        return [flashdp.clip_factors(v.square().sum(1), 0.5, "hard", False, None, False) for v in vectors]

    of = check_made(weigh, [torch.randn(3, 4), torch.randn(3, 7), torch.randn(3, 4, dtype=torch.float64)], 2)
    (together,) = of.find_nodes(op="call_function", target=flashdp.group_weights.default)
    assert [len(own) for own in together.args[:2]] == [1, 1]
    assert all(n.target is not operator.getitem for n in together.all_input_nodes)
    assert isinstance(of, fx.Graph)
