"""What runs on a graph last: noise into sums, kernels in the place of ops. The numbers stay what they were."""

import sys
from pathlib import Path

import pytest
import torch
from corrupt import NOISY, graph
from pass_support import random_inputs, rewritten, run
from small_models import Block, Tied
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from flashdp_compile.compat import recorded_launches
from flashdp_compile.errors import InternalError
from flashdp_compile.passes.late.fuse_noise import fuse_noise
from flashdp_compile.passes.late.inline import inline_kernels
from flashdp_compile.passes.late.vectors import norm_vectors, sum_vectors
from flashdp_compile.pipeline import LastPass
from flashdp_compile.runtime import noise

aten, flashdp = torch.ops.aten, torch.ops.flashdp
ON_GPU = torch.cuda.is_available()
MODELS = {
    "linear": lambda strategy: graph(strategy, mechanism=NOISY),
    "block": lambda strategy: rewritten(
        Block(), torch.randn(3, 4, 6), strategy=strategy, clipping="per_layer", mechanism=NOISY
    ),
    "tied": lambda strategy: rewritten(
        Tied(), torch.randint(0, 11, (3, 4)), strategy=strategy, clipping="flat", mechanism=NOISY
    ),
}


@pytest.fixture(autouse=True)
def interpreted():
    """Without a GPU the kernels that are inlined run in Triton's interpreter."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
    if not ON_GPU:  # see tests/kernels/conftest.py
        import interpreter_fixes

        interpreter_fixes.apply()


def names(of: fx.Graph) -> list[str]:
    return [n.target._opname for n in of.nodes if getattr(n.target, "namespace", None) == "flashdp"]


def outputs(of: fx.Graph, inputs: list[object]) -> list[torch.Tensor]:
    noise.KEYS.reset()  # the same key for every run: the mechanism has a seed
    return [value for value in run(of, inputs) if isinstance(value, torch.Tensor)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(a, b, strict=True))


POINTS = [(m, s) for m in MODELS for s in ("auto", "gram", "outer", "store") if m != "tied" or s in ("auto", "gram")]


@pytest.mark.parametrize("model, strategy", [*POINTS, ("linear", "materialize"), ("tied", "materialize")])
def test_noise_is_fused_and_stays_the_same(model, strategy):
    of = MODELS[model](strategy).joint.graph
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    assert "add_noise" in names(of)
    left = fuse_noise(of, device="cpu")
    alone = (model, strategy) == ("tied", "gram")  # what two kernels have summed gets its noise afterwards
    assert sum_vectors(of, device="cpu") == left - alone
    of.lint()
    assert names(of).count("add_noise") == alone
    assert same(before, outputs(of, inputs))


def test_the_noise_of_a_sum_is_drawn_inside():
    of = graph("store").joint.graph
    fuse_noise(of, device="cpu")
    sums = of.find_nodes(op="call_function", target=flashdp.product_sum.default)
    assert len(sums) == 2
    assert len({s.kwargs["stream"] for s in sums}) == 2
    assert len({s.kwargs["key"] for s in sums}) == 1


def test_a_sum_that_is_used_twice_keeps_its_noise_apart():
    """The other user would see a sum with noise where it saw one without."""
    found = graph("store")
    of, target = (
        found.joint.graph,
        next(iter(found.joint.graph.find_nodes(op="call_function", target=flashdp.product_sum.default))),
    )
    with of.inserting_after(target):
        of.call_function(aten.neg.default, (target,))
    fuse_noise(of, device="cpu")
    assert not target.kwargs


def test_large_gradients_keep_a_launch_of_their_own(monkeypatch):
    monkeypatch.setattr("flashdp_compile.passes.late.norms.SMALL", 3 * 5)
    of = graph("materialize").joint.graph
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    assert sum_vectors(of, device="cpu") == 1  # of 36, 6, 30 and 5 elements for each of 3 samples
    assert names(of).count("add_noise") == 3
    assert same(before, outputs(of, inputs))


def test_vectors_are_summed_so_many_at_a_time(monkeypatch):
    monkeypatch.setattr("flashdp_compile.passes.late.vectors.AT_ONCE", 2)
    of = graph("materialize").joint.graph
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    assert sum_vectors(of, device="cpu") == 4
    assert names(of).count("vector_sums") == 2
    assert not of.find_nodes(op="call_function", target=aten.where.self), "what was read before is gone"
    assert same(before, outputs(of, inputs))


@pytest.mark.parametrize("model, strategy", [("linear", "materialize"), ("block", "gram"), ("tied", "materialize")])
@pytest.mark.parametrize("at_once", [1, 64])
def test_norms_of_vectors_are_taken_together(model, strategy, at_once, monkeypatch):
    """Of the layers that are clipped together; the others' norms, which the count of bad samples reads, come along."""
    monkeypatch.setattr("flashdp_compile.passes.late.vectors.AT_ONCE", at_once)
    of = MODELS[model](strategy).joint.graph
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    squares = len(of.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar))
    done = norm_vectors(of, device="cpu")
    of.lint()
    assert done >= 2
    assert len(of.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)) == squares - done
    assert names(of).count("vector_sqnorms") >= done / at_once / 2
    assert same(before, outputs(of, inputs))


def test_norms_of_long_vectors_stay_apart(monkeypatch):
    """The kernel would add up their squares in long chains, and materialize states a slack of 2^-20."""
    monkeypatch.setattr("flashdp_compile.passes.late.norms.LONG", 6)

    def weights(*vectors):
        a, b, c, d = (v.square().sum(1) for v in vectors)
        return [flashdp.clip_factors(a + b + c + d, 0.5, "hard", False, None)]

    vectors = [torch.randn(3, n) for n in (4, 7, 5, 6)]
    of = make_fx(weights, tracing_mode="fake")(*vectors).graph
    assert norm_vectors(of, device="cpu") == 3
    assert len(of.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)) == 1
    assert torch.allclose(outputs(of, vectors)[0], weights(*vectors)[0])


@pytest.mark.parametrize("apart", [False, True])
def test_a_norm_that_counts_twice_does_so_afterwards(apart):
    def weights(*vectors):
        twice, *once = (v.square().sum(1) for v in vectors)
        total = twice + once[0] + once[1] + twice if apart else twice + twice + once[0] + once[1]
        return [flashdp.clip_factors(total, 0.5, "hard", False, None)]

    vectors = [torch.randn(3, n) for n in (4, 5, 6)]
    of = make_fx(weights, tracing_mode="fake")(*vectors).graph
    assert norm_vectors(of, device="cpu") == 2
    assert torch.allclose(outputs(of, vectors)[0], weights(*vectors)[0])


def test_weights_along_another_dimension_are_left_alone():
    """As many samples as elements: the shapes alone do not tell."""
    of = graph("materialize").joint.graph
    noise = next(iter(of.find_nodes(op="call_function", target=flashdp.add_noise.default)))
    weighted = noise.args[0].args[0].args[1]
    by = next(n for n in weighted.args if n.target is aten.view.default)
    by.meta["val"] = by.meta["val"].new_empty(tuple(by.meta["val"].shape)[::-1])
    left = len(of.find_nodes(op="call_function", target=flashdp.add_noise.default))
    assert 0 < sum_vectors(of, device="cpu") < left


@pytest.mark.skipif(ON_GPU, reason="runs kernels on CPU tensors; the tests of Inductor run them on a GPU")
@pytest.mark.parametrize("model, strategy", POINTS)
def test_kernels_take_the_place_of_ops(model, strategy):
    of = MODELS[model](strategy).joint.graph
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    fuse_noise(of, device="cpu")
    norm_vectors(of, device="cpu")
    sum_vectors(of, device="cpu")
    ops = names(of)
    assert inline_kernels(of, device="cpu") == len(ops) - ops.count("draw_key") - 1
    of.lint()
    assert set(names(of)) == {"draw_key", "clip_factors"}, "the counting call and the key stay ops"
    assert len(recorded_launches(of)) >= len(set(ops)) - 2
    assert same(before, outputs(of, inputs))


def test_strides_of_operands_are_pinned():
    """Inductor may pad rows; the strides are among a launch's numbers, so an operand must have those."""
    of = graph("store").joint.graph
    inline_kernels(of, device="cpu")
    for launch in recorded_launches(of):
        _, pinned = launch.meta["eager_input_vals"]
        for name, value in launch.kwargs["kwargs"].items():
            if isinstance(value, fx.Node):
                assert pinned["kwargs"][name] is value.meta["val"]


def test_a_write_that_inductor_does_not_see_is_an_error(monkeypatch):
    """It may then read the buffer before the launch, or drop the launch: noise that is missing."""
    of = graph("store").joint.graph
    monkeypatch.setattr("flashdp_compile.passes.late.inline.written_by", lambda launch: {"part_ptr"})
    with pytest.raises(InternalError, match="does not see that a kernel of flashdp writes"):
        inline_kernels(of, device="cpu")


def test_sizes_that_are_symbols_stay_ops():
    of = rewritten(nn.Linear(6, 5), torch.randn(3, 4, 6), dynamic=True, strategy="store", mechanism=NOISY).joint.graph
    assert isinstance(
        of.find_nodes(op="call_function", target=flashdp.product_sum.default)[0].meta["val"], torch.Tensor
    )
    before = names(of)
    inline_kernels(of, device="cpu")
    assert [n for n in names(of) if n != "add_noise"] == [n for n in before if n != "add_noise"]


def test_other_devices_are_left_alone():
    of = graph("store").joint.graph
    before = [str(n) for n in of.nodes]
    assert fuse_noise(of, device="cuda") == 0 and inline_kernels(of, device="cuda") == 0
    assert [str(n) for n in of.nodes] == before


def test_the_norm_and_the_sum_of_an_embedding_sort_the_ids_once():
    def both(ids, g, other):
        sqnorm = flashdp.embedding_sqnorm(ids, g)
        return sqnorm, flashdp.embedding_sum(ids, g, sqnorm, 5), flashdp.embedding_sqnorm(other, g)

    ids, other = torch.randint(0, 5, (2, 4, 6))
    of = make_fx(both, tracing_mode="fake")(ids, torch.randn(4, 6, 3), other).graph
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    inline_kernels(of, device="cpu")
    assert len(of.find_nodes(op="call_function", target=aten.sort.stable)) == 2, "for the other ids another time"
    if not ON_GPU:  # the launches are those of CPU tensors, in the interpreter
        assert same(before, outputs(of, inputs))


def test_equal_draws_are_sorted_apart():
    """Two permutations of a model's own: what reads the same need not be the same."""

    def permutations(scores):
        draws = [torch.randperm(6) for _ in range(2)] + [torch.rand_like(scores) for _ in range(2)]
        return [torch.sort(draw, stable=True)[1] for draw in draws]

    of = make_fx(permutations, tracing_mode="fake")(torch.ones(6)).graph
    inline_kernels(of, device="cpu")
    assert len(of.find_nodes(op="call_function", target=aten.sort.stable)) == 4


def test_nodes_may_come_in_any_order():
    """So Inductor's own passes leave them; it sorts them only behind ours."""
    of = graph("store").joint.graph
    inputs = random_inputs(of)
    before = outputs(of, inputs)
    store = next(iter(of.find_nodes(op="call_function", target=flashdp.outer_store.default)))
    of.output_node().prepend(store)  # behind all that reads it
    with pytest.raises(RuntimeError):
        of.lint()
    LastPass()(of)
    of.lint()
    assert same(before, outputs(of, inputs))
