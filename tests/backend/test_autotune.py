"""`autotune=True`: strategies are timed on factors of the layer's own sizes, once, and the fastest is taken."""

import json

import pytest
import torch
from torch import nn

from flashdp_compile import autotune
from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.cost import Factors
from flashdp_compile.passes.plan import make_plan
from flashdp_compile.passes.points import find_points
from flashdp_compile.passes.strategies.catalogue import STRATEGIES
from flashdp_compile.passes.strategies.embedding import EMBEDDING, TIED, TIED_STORE
from flashdp_compile.passes.strategies.linear import GRAM, OUTER, STORE
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.testing import joint_graph

FACTORS = Factors(3, 5, 7, 9, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(autotune, "SECONDS", 0.002)


@pytest.fixture
def measured(monkeypatch):
    """The strategies' trials, in order."""
    seen = []
    real = autotune._measured
    monkeypatch.setattr(autotune, "_measured", lambda trial, factors: seen.append(factors) or real(trial, factors))
    return seen


@pytest.mark.parametrize("strategy", [GRAM, OUTER, STORE, MATERIALIZE])
def test_a_trial_runs_both_halves(strategy):
    """What it gives are the norms of the samples and their weighted sum."""
    x, g, weights = torch.randn(3, 5, 7), torch.randn(3, 5, 9), torch.rand(3)
    sqnorm, total = strategy.trial(x, g, weights)
    products = torch.einsum("btd,btp->bdp", x, g)
    torch.testing.assert_close(sqnorm, products.square().sum((1, 2)), rtol=1e-2, atol=0)
    torch.testing.assert_close(total, torch.einsum("b,bdp->dp", weights, products), rtol=1e-4, atol=1e-4)


def test_times_are_kept_for_each_question(measured, tmp_path):
    seconds = autotune.timer("sources")
    first = seconds(GRAM, FACTORS)
    assert 0 < first < 1 and len(measured) == 1
    assert autotune.timer("sources")(GRAM, FACTORS) == first and len(measured) == 1, "another process reads the file"
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text()) == {"strategy": "gram", "seconds": first}
    seconds(STORE, FACTORS)
    seconds(GRAM, Factors(4, 5, 7, 9, torch.float32, torch.device("cpu")))
    seconds(GRAM, Factors(3, 5, 7, 9, torch.bfloat16, torch.device("cpu")))
    autotune.timer("other sources")(GRAM, FACTORS)
    assert len(measured) == 5


def test_a_damaged_file_is_measured_anew(measured, tmp_path):
    autotune.timer("sources")(GRAM, FACTORS)
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{")
    assert autotune.timer("sources")(GRAM, FACTORS) > 0 and len(measured) == 2


def test_what_cannot_be_tried_or_held(monkeypatch):
    seconds = autotune.timer("sources")
    assert {s for s in STRATEGIES if seconds(s, FACTORS) is None} == {EMBEDDING, TIED, TIED_STORE}

    def full(*operands):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(autotune, "median_seconds", full)
    assert seconds(STORE, Factors(8, 5, 7, 9, torch.float32, torch.device("cpu"))) == float("inf")


def test_the_fastest_by_the_watch_is_taken():
    axes = propagate(joint_graph(nn.Linear(6, 4), torch.randn(2, 3, 6)))
    asked = []

    def timed(fastest):
        def seconds(strategy, factors):
            asked.append(factors)
            return None if strategy.trial is None else 1e-9 if strategy is fastest else 1.0

        return seconds

    for fastest in (GRAM, OUTER, STORE, MATERIALIZE):
        plan = make_plan(find_points(axes), axes, "flat", 1.0, timed=timed(fastest))
        by_name = {c.gradient.name: c for c in plan.choices["all"]}
        assert by_name["weight"].strategy is fastest
        assert by_name["weight"].seconds[fastest.name] == 1e-9
        assert sorted(by_name["weight"].seconds.values()) == [1e-9, 1.0, 1.0, 1.0]
        assert by_name["bias"].strategy.name == "materialize"
    assert set(asked) == {Factors(2, 3, 4, 6, torch.float32, torch.device("cpu"))}


def test_a_measured_step_is_the_private_step(measured):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 6)
    state = torch.get_rng_state()
    options = {"autotune": True, "noise_multiplier": 0.0, "compiler": "eager", "max_grad_norm": 0.3}
    torch.compile(model, backend="flashdp", fullgraph=True, options=options)(x).square().sum(1).mean().backward()
    assert {(f.B, f.T, f.d, f.p) for f in measured} == {(4, 1, 5, 6), (4, 1, 3, 5)}
    assert torch.equal(torch.get_rng_state(), state), "the user's generator is left alone"
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for one in x.split(1):
        gradients = torch.autograd.grad(model(one).square().sum(), list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, 0.3 / norm) / len(x)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
