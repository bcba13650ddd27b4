"""An engine whose samples are clipped by estimated norms: its noise, its probes, and what it refuses."""

import pytest
import torch
from torch import nn

from engine.runs import backward, copies, moved
from flashdp_compile import OptionError, PrivacyEngine, Refusal, UnprotectedGradientError, accounting
from flashdp_compile.engine.bound_rules import Quantile
from flashdp_compile.engine.norms import accounted_norms
from flashdp_compile.options import Options
from flashdp_compile.runtime.from_engine import FromEngine
from flashdp_compile.runtime.probe_keys import HeldProbes

RUN = {"target_delta": 1e-5, "expected_batch_size": 8, "sample_size": 800, "steps": 50}
ESTIMATED = {"options": {"norm": "hutchinson", "probes": 16, "compiler": "eager"}}


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(90, 96), nn.Tanh(), nn.Linear(96, 1))


def samples() -> torch.Tensor:
    return torch.randn(8, 90, generator=torch.Generator().manual_seed(1))


def silent(micro_batches: int = 1, **settings):
    """Without noise and without a loader: sums can be compared. Estimates ask for Poisson sampling."""
    own = {"noise_multiplier": 0.0, "sampling": accounting.Poisson(0.01, 800), "micro_batches": micro_batches}
    engine = PrivacyEngine(**{**RUN, "max_grad_norm": 0.1, **own, **ESTIMATED, **settings})
    model = wide()
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    return engine, model, engine.compile(model), optimizer


def test_the_noise_pays_for_what_estimates_miss():
    run = {**RUN, "steps": 200, "target_epsilon": 0.5}  # with so much noise, the accountant is quick
    plain, estimated = (PrivacyEngine(**run, **more) for more in ({}, ESTIMATED))
    assert plain.inflation() == 1
    ratio = estimated.noise_multiplier / plain.noise_multiplier
    assert ratio > 1.2 and estimated.inflation() == pytest.approx(ratio, rel=1e-3)
    assert estimated.plan.epsilon(200) <= 0.5 < estimated.plan.epsilon(201)


def accounted(groups=None, bounds=None, **options):
    norms, count = accounted_norms(Options(**{"norm": "hutchinson", "probes": 16, **options}), groups, bounds)
    return norms, count


def test_what_the_accountant_is_told():
    assert accounted(norm="exact") == ({}, None)
    assert accounted() == ({"norm": "hutchinson", "probes": 16, "groups": 1}, 1)
    assert accounted(norm="hutch++")[0]["norm"] == "hutch++"
    assert accounted(norm="auto") == accounted(), "some layers are estimated, others cost nothing more"
    assert accounted(3, clipping="per_layer") == ({"norm": "hutchinson", "probes": 16, "groups": 3}, 3)


def test_the_count_of_norms_is_a_group_of_its_own():
    norms, count = accounted(2, Quantile(share=0.04), clipping="per_layer")
    assert count == 2 and norms["groups"] == pytest.approx([0.48**0.5, 0.48**0.5, 0.2])


def test_the_probes_of_a_logical_batch_are_the_same_in_every_micro_batch():
    steps = []
    for parts in (1, 3):
        engine, model, compiled, optimizer = silent(parts, seed=3)
        before = copies(model)
        for rows in samples().tensor_split(parts):
            backward(compiled, rows)
            optimizer.step()
        steps.append(torch.cat([change.flatten() for change in moved(model, before)]))
        assert engine._steps._from_engine.probes.moves == 1, "one step has been taken"
    # each part's mean is over fewer samples, and backward is called on means
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-7)


def test_the_next_step_has_other_probes():
    engine, model, compiled, optimizer = silent()
    changes = []
    for _ in range(2):
        before = copies(model)
        backward(compiled, samples())
        optimizer.step()
        optimizer.zero_grad()
        changes.append(torch.cat([change.flatten() for change in moved(model, before)]))
        with torch.no_grad():
            for p, start in zip(model.parameters(), before, strict=True):
                p.copy_(start)
    assert engine.steps_done == 2
    assert not torch.allclose(changes[0], changes[1], rtol=1e-3)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"clipping": "per_layer"}, "groups is missing"),
        ({"clipping": "per_layer", "groups": 2, "max_grad_norm": {"*": 1.0}}, "a bound for each pattern"),
        ({"accountant": "rdp"}, "Renyi divergences are infinite"),
        ({"cap": 20}, "not covered"),
        ({"sampling": accounting.WithoutReplacement(8, 800)}, "not covered"),
        ({"options": {"norm": "exact"}, "groups": 2}, "no use with norm='exact'"),
        ({"options": {"from_engine": 2}}, "the engine's own"),
    ],
)
def test_what_has_no_accountant_is_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        PrivacyEngine(**{**RUN, "target_epsilon": 2.0, **ESTIMATED, **settings})


def test_a_batch_of_one_sample_is_refused():
    """Its norm would be exact: whoever is there would decide by what norm another is clipped."""
    engine, model, compiled, optimizer = silent()
    with pytest.raises(Refusal, match="a batch of one sample, and norm='hutchinson'"):
        backward(compiled, samples()[:1])
    assert engine.steps_done == 0


@pytest.mark.parametrize("physical", [3, 4])
def test_a_loader_leaves_no_part_of_one_sample(physical):
    engine = PrivacyEngine(**{**RUN, "steps": 60}, noise_multiplier=1.0, seed=0, **ESTIMATED)
    data = torch.utils.data.TensorDataset(torch.zeros(800, 1))
    loader = engine.data_loader(data, physical_batch_size=physical)
    sizes = [len(rows) for (rows,) in loader]
    assert {2, physical} <= {*sizes} and max(sizes) == physical
    assert sizes.count(1) == 0, "the seed draws no logical batch of one"
    for small in (1, 2):
        with pytest.raises(OptionError, match=f"physical_batch_size={small} .*allowed: at least 3"):
            engine.data_loader(data, physical_batch_size=small)
    assert len(next(iter(engine.data_loader(data, physical_batch_size=2, pad=True)))[1]) == 2


def test_two_models_must_not_have_the_same_probes():
    """Each of two steps is accounted for as if its probes were its own."""
    engine, model, compiled, optimizer = silent()
    other = wide()
    second = engine.attach(torch.optim.SGD(other.parameters(), lr=1.0))
    backward(compiled, samples())
    backward(engine.compile(other), samples())
    optimizer.step()
    with pytest.raises(UnprotectedGradientError, match="used up the probes"):
        second.step()
    backward(engine.compile(other), samples())
    second.step()
    assert engine.steps_done == 2


@pytest.mark.parametrize("options", [{}, {"norm": "hutchinson", "probes": 32}, {"norm": "hutch++", "probes": 16}])
def test_a_model_that_was_compiled_for_other_norms_is_refused(options):
    engine, model, _, optimizer = silent()
    other, *_ = silent(options={"compiler": "eager", **options})
    backward(other.compile(model), samples())
    with pytest.raises(UnprotectedGradientError):
        optimizer.step()
    assert engine.steps_done == 0


@pytest.mark.parametrize("probes", [None, HeldProbes("hutchinson", 32, 1), HeldProbes("hutch++", 16, 1)])
def test_estimates_owe_their_noise_to_an_engine_alone(probes):
    """One that knows of other estimates, or of none, will not do."""
    settings = {"norm": "hutchinson", "probes": 16, "compiler": "eager", "noise_at": "step", "expected_batch_size": 8}
    compiled = torch.compile(wide(), backend="flashdp", options={**settings, "from_engine": FromEngine(probes=probes)})
    with pytest.raises(Refusal, match="noise_at='step' is for a PrivacyEngine"):
        compiled(samples())


@pytest.mark.parametrize("groups", [1, 3])
def test_another_number_of_groups_is_refused(groups):
    engine, _, compiled, _ = silent(clipping="per_layer", groups=groups)
    with pytest.raises(Refusal, match=f"estimated in {groups} clipping group.*this step has 2.*groups=2"):
        backward(compiled, samples())


def test_a_run_does_not_go_on_by_other_norms():
    engine, *_ = silent()
    exact = PrivacyEngine(
        **{**RUN, "max_grad_norm": 0.1, "noise_multiplier": 0.0, "sampling": accounting.Poisson(0.01, 800)}
    )
    with pytest.raises(OptionError, match="norms is"):
        exact.load_state_dict(engine.state_dict())


def test_a_schedule_of_bounds_goes_with_estimates():
    engine, model, compiled, optimizer = silent(bounds=lambda step: 2.0)
    before = copies(model)
    backward(compiled, samples())
    optimizer.step()
    length = torch.cat([change.flatten() for change in moved(model, before)]).norm()
    assert 0 < length < 0.2 * 2
