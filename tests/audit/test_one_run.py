"""The game: guesses, canaries, and runs of a PrivacyEngine, right ones and broken ones."""

import math

import pytest
import torch

from flashdp_compile import OptionError, PrivacyEngine, accounting
from flashdp_compile.audit import DiracCanaries, epsilon_lower_bound, one_run

STEPS = 4


def randomized_response(epsilon: float, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def train(included):
        kept = torch.rand(len(included), generator=generator) < 1 / (1 + math.exp(-epsilon))
        return torch.where(kept, included, ~included).float()

    return train


def test_randomized_response_is_covered_and_nearly_reached():
    runs = [one_run(randomized_response(1.0, s), 3000, guesses=2000, delta=0.0, seed=s).epsilon for s in range(100)]
    assert sum(bound <= 1.0 for bound in runs) >= 0.95 * len(runs)
    assert sum(runs) / len(runs) > 0.8


def test_guesses_are_the_extremes():
    """Scores that tell only at both ends: guesses beyond them are chance, and the middle is left out."""

    def train(included):
        scores = torch.zeros(len(included))
        scores[:20] = included[:20] * 2.0 - 1
        return scores

    few = one_run(train, 1000, guesses=10, delta=0.0, seed=3)
    assert (few.correct, few.guesses, few.canaries) == (10, 10, 1000)
    assert few.epsilon == epsilon_lower_bound(10, 10, 0.0, 0.95, 1000) and "10 of 10" in str(few)
    assert one_run(train, 1000, delta=0.0, seed=3).correct < 600
    upside_down = one_run(lambda included: -train(included), 1000, guesses=10, delta=0.0, seed=3)
    assert upside_down.correct == upside_down.epsilon == 0


def test_coins_are_fair_and_fresh():
    seen = []

    def train(included):
        seen.append(included)
        return torch.zeros(len(included))

    for seed in (1, 1, None, None):
        one_run(train, 10000, delta=0.0, seed=seed)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])
    assert all(4800 < coins.sum() < 5200 for coins in seen)


def test_scores_of_another_form_are_refused():
    for scores in (torch.zeros(9), torch.full((10,), math.nan), torch.zeros(10, 1)):
        with pytest.raises(OptionError, match="one finite number for each of 10 canaries"):
            one_run(lambda included, scores=scores: scores, 10, delta=0.0)
    with pytest.raises(OptionError, match="guesses=11"):
        one_run(lambda included: pytest.fail("trained"), 10, guesses=11, delta=0.0)


def engine(count: int, delta: float = 1e-6, epsilon: float | None = 1.0, **settings) -> PrivacyEngine:
    own = {
        "target_epsilon": epsilon,
        "target_delta": delta,
        "steps": STEPS,
        "expected_batch_size": count // 2,
        "sampling": accounting.Fixed(1),
        "seed": 0,
        "options": {"compiler": "eager"},
    }
    return PrivacyEngine(**{**own, **settings})


@pytest.mark.parametrize("lookup, layers, micro_batches", [(False, 1, 1), (True, 2, 3)])
def test_without_noise_a_canary_scores_its_bound(lookup, layers, micro_batches):
    canaries = DiracCanaries(20, layers=layers, lookup=lookup)
    included = torch.arange(20) % 3 == 0
    its = engine(20, epsilon=None, noise_multiplier=0.0, max_grad_norm=0.5, micro_batches=micro_batches)
    scores = canaries.scores(its, included, STEPS)
    each = STEPS * math.sqrt(layers) * 0.5 / 10  # the inner product with (1, ..., 1) of a vector of length C / L
    torch.testing.assert_close(scores, included * each, rtol=3e-3, atol=1e-6)
    with pytest.raises(OptionError, match="an audit needs one for itself"):
        canaries.scores(its, included, STEPS)


def right(add):
    return add


def no_noise(add):
    return lambda totals, step, streams, std: totals


def half_the_deviation(add):
    return lambda totals, step, streams, std: add(totals, step, streams, std / 2)


def drawn_again_in_each_step(add):
    return lambda totals, step, streams, std: add(totals, 1, streams, std)


def layer_left_unclipped(add):
    """The second parameter's sum as it were if nothing had clipped it: gain for C / sqrt(2) in each coordinate."""

    def broken(totals, step, streams, std):
        grown = [t * (1e3 * math.sqrt(2) if s == 1 else 1.0) for t, s in zip(totals, streams, strict=True)]
        return add(grown, step, streams, std)

    return broken


def audited(broken, canaries: DiracCanaries, guesses: int, seed: int, noise: str = "secure"):
    its = engine(canaries.count, noise=noise)
    its._steps.noise.add = broken(its._steps.noise.add)
    run = one_run(
        lambda included: canaries.scores(its, included, STEPS), canaries.count, delta=1e-6, guesses=guesses, seed=seed
    )
    assert its.steps_done == STEPS and 0.99 < its.epsilon() <= 1.0
    return run


def test_a_right_run_stays_below_its_epsilon():
    run = audited(right, DiracCanaries(1000, layers=2), 400, 0)
    assert run.epsilon < 1.0 and run.correct > 200


@pytest.mark.parametrize("noise", ["secure", "philox"])
def test_of_many_canaries_a_right_run_stays_below_its_epsilon(noise):
    assert 0.3 < audited(right, DiracCanaries(50_000, lookup=True), 1000, 0, noise).epsilon < 1.0


@pytest.mark.parametrize("broken", [no_noise, drawn_again_in_each_step, layer_left_unclipped], ids=lambda f: f.__name__)
def test_a_broken_run_rises_above_it(broken):
    run = audited(broken, DiracCanaries(1000, layers=2), 400, 0)
    assert run.correct == run.guesses and run.epsilon > 4


@pytest.mark.parametrize("noise", ["secure", "philox"])
def test_half_the_noise_rises_above_it(noise):
    """What many canaries are for: their extremes tell more."""
    assert audited(half_the_deviation, DiracCanaries(50_000, lookup=True), 1000, 0, noise).epsilon > 1.0
