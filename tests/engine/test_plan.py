"""What a run may spend, from what the user has said; and what is refused of it, by name."""

import logging

import pytest
import torch

from engine.runs import BATCH, BOUND, engine
from flashdp_compile import OptionError, PrivacyEngine, accounting
from flashdp_compile.accounting import Fixed, Poisson, TruncatedPoisson

RUN = {"target_delta": 1e-5, "sample_size": 10_000, "expected_batch_size": 100}


def test_noise_for_a_budget():
    its = PrivacyEngine(**RUN, target_epsilon=2.0, epochs=3, accountant="rdp")
    assert its.plan.steps == 300 and its.plan.sampling == Poisson(0.01, 10_000)
    spent = {"steps": 300, "delta": 1e-5, "sampling": Poisson(0.01, 10_000), "accountant": "rdp"}
    sigma = accounting.noise_multiplier(target_epsilon=2.0, **spent)
    assert its.noise_multiplier == sigma
    assert its.epsilon() == 0.0 and its.steps_left == 300


def test_a_part_of_an_epoch_is_rounded_up():
    assert PrivacyEngine(**{**RUN, "expected_batch_size": 300}, noise_multiplier=1.0, epochs=1).plan.steps == 34


def test_steps_for_a_budget_and_a_noise():
    budget = {**RUN, "target_epsilon": 1.0, "noise_multiplier": 1.0, "accountant": "rdp"}
    its = PrivacyEngine(**budget)
    spent = {"noise_multiplier": 1.0, "delta": 1e-5, "sampling": Poisson(0.01, 10_000), "accountant": "rdp"}
    assert accounting.epsilon(steps=its.plan.steps, **spent) <= 1.0
    assert accounting.epsilon(steps=its.plan.steps + 1, **spent) > 1.0
    shorter = PrivacyEngine(**budget, steps=its.plan.steps - 1)
    assert shorter.plan.steps == its.plan.steps - 1
    longer = PrivacyEngine(**budget, steps=its.plan.steps + 50)
    assert longer.plan.steps == its.plan.steps, "the budget ends before the plan"


def test_nothing_limits_a_run_without_a_target():
    its = PrivacyEngine(**RUN, noise_multiplier=1.0)
    assert its.plan.steps is None and its.steps_left is None


def test_a_cap_is_truncated_sampling():
    its = PrivacyEngine(**RUN, noise_multiplier=1.0, steps=10, cap=150)
    assert its.plan.sampling == TruncatedPoisson(0.01, 150, 10_000)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"noise_multiplier": None}, "give target_epsilon"),
        ({"noise_multiplier": None, "target_epsilon": 1.0}, "target_epsilon needs steps or epochs"),
        ({"sample_size": None}, "sample_size is missing"),
        ({"sample_size": 50}, "expected_batch_size=100"),
        ({"expected_batch_size": 0}, "expected_batch_size=0"),
        ({"expected_batch_size": 1.5}, "expected_batch_size=1.5"),
        ({"epochs": 1, "steps": 10}, "epochs and steps are both given"),
        ({"epochs": 0}, "epochs=0"),
        ({"sample_size": None, "sampling": Fixed(10), "epochs": 1}, "epochs needs sample_size"),
        ({"sampling": Fixed(10), "cap": 10}, "cap is given beside sampling"),
        ({"sampling": Poisson(0.01, 500)}, "sample_size=10000, but sampling says 500"),
        ({"sampling": 0.01}, "sampling=0.01"),
        ({"cap": 0}, "cap=0"),
        ({"target_delta": 2.0}, "delta=2.0"),
        ({"target_epsilon": -1.0}, "target_epsilon=-1.0"),
        ({"target_epsilon": 1e-4}, "is less than what one step spends"),
        ({"accountant": "moments"}, "accountant="),
        ({"cap": 150, "accountant": "rdp"}, "accountant='rdp' knows no bound for TruncatedPoisson"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"options": {"noise_multiplier": 1.0}}, "options holds 'noise_multiplier'"),
        ({"options": {"seed": 1}}, "options holds 'seed'"),
        ({"options": {"speed": 1}}, "unknown option 'speed'"),
    ],
    ids=str,
)
def test_what_is_refused(settings, text):
    with pytest.raises(OptionError) as caught:
        PrivacyEngine(**{**RUN, "noise_multiplier": 1.0, **settings})
    assert text in str(caught.value)


def test_a_delta_that_allows_to_publish_a_sample_warns():
    with pytest.warns(UserWarning, match="publishing a sample"):
        PrivacyEngine(**{**RUN, "target_delta": 1e-3}, noise_multiplier=1.0)


def test_a_seed_is_said_loudly(caplog):
    with caplog.at_level(logging.WARNING, "flashdp_compile"):
        engine(seed=1)
    assert "whoever knows it can subtract the noise" in caplog.text


@pytest.mark.parametrize("setting", ["backend", "options", "mode"])
def test_settings_of_compile_that_are_the_engine_s(setting):
    with pytest.raises(OptionError, match=setting):
        engine().compile(None, **{setting: None})


SCHEDULE = [(2.0, 3), (1.0, 0), (0.5, 4)]


def test_a_schedule_of_noise():
    its = engine(noise_multiplier=SCHEDULE, steps=None)
    assert its.plan.steps == its.steps_left == 7
    assert [its.plan.sigma(step) for step in range(7)] == [2.0] * 3 + [0.5] * 4
    for steps in (1, 3, 5, 7):
        parts = [(2.0, min(steps, 3)), (0.5, max(steps - 3, 0))]
        alone = accounting.epsilon(noise_multiplier=parts, delta=1e-5, sampling=accounting.Fixed(10))
        assert its.plan.epsilon(steps) == alone
    engine(noise_multiplier=SCHEDULE, steps=7)
    with pytest.raises(OptionError, match="a schedule of 7 steps, but 8 are planned"):
        engine(noise_multiplier=SCHEDULE, steps=8)
    for wrong in ([(1.0, -1)], [1.0], [(1.0, 0)], []):
        with pytest.raises(OptionError, match="noise_multiplier|steps=-1"):
            engine(noise_multiplier=wrong, steps=None)


def test_a_budget_cuts_a_schedule_short():
    schedule = [(8.0, 50), (1.0, 50)]
    how = {"sampling": accounting.Poisson(0.05), "steps": None}
    whole = engine(noise_multiplier=schedule, **how)
    cut = engine(noise_multiplier=schedule, target_epsilon=whole.plan.epsilon(60), **how)
    assert cut.plan.steps == 60


def test_each_step_has_the_noise_of_its_place():
    torch.manual_seed(0)
    model = torch.nn.Linear(3000, 1, bias=False)
    its = engine(noise_multiplier=[(4.0, 2), (1.0, 1)], steps=None, seed=1)
    optimizer, compiled = its.attach(torch.optim.SGD(model.parameters(), lr=0.0)), its.compile(model)
    for sigma in (4.0, 4.0, 1.0):
        compiled(torch.zeros(BATCH, 3000)).square().sum(1).mean().backward()
        optimizer.step()
        assert model.weight.grad.std().item() == pytest.approx(sigma * BOUND / BATCH, rel=0.05)
