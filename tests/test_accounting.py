"""Epsilon and noise of a run: against dp-accounting itself, a closed form, and for every way to draw samples."""

import json
import math
import subprocess
import sys

import dp_accounting as dp
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, strategies as st
from scipy.stats import norm

from flashdp_compile import accounting
from flashdp_compile.accounting import Fixed, Poisson, TruncatedPoisson, WithoutReplacement, epsilon, noise_multiplier
from flashdp_compile.accounting.sampling import by_pass
from flashdp_compile.command import main
from flashdp_compile.errors import OptionError

DELTA = 1e-5
REPLACE_ONE = dp.NeighboringRelation.REPLACE_ONE


def gaussian_delta(sigma: float, eps: float) -> float:
    """Of one Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, theorem 8)."""
    return norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma)


@pytest.mark.parametrize("sigma, rate, steps", [(1.0, 0.01, 1000), (0.8, 0.05, 200), (4.0, 0.01, 10000)])
@pytest.mark.parametrize("name", accounting.ACCOUNTANTS)
def test_epsilon_is_that_of_dp_accounting(name, sigma, rate, steps):
    accountant = pld.PLDAccountant() if name == "pld" else rdp.RdpAccountant()
    accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), steps)
    found = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=DELTA, accountant=name)
    assert found == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-6)
    assert found == epsilon(noise_multiplier=sigma, sampling=Poisson(rate), steps=steps, delta=DELTA, accountant=name)


def test_the_moments_accountant_of_abadi_et_al_is_an_upper_bound():
    """ "Deep learning with differential privacy" (2016), section 3.2: 1.26 for this run."""
    run = {"noise_multiplier": 4.0, "sample_rate": 0.01, "steps": 10000, "delta": DELTA}
    tight, renyi = epsilon(**run), epsilon(**run, accountant="rdp")
    assert 0.9 < tight < renyi < 1.26


def test_one_release_is_a_gaussian_mechanism():
    for sigma in (0.7, 1.0, 3.730632):
        found = epsilon(noise_multiplier=sigma, sampling=Fixed(1), steps=1, delta=DELTA)
        assert gaussian_delta(sigma, found) == pytest.approx(DELTA, rel=2e-3)
    assert found == pytest.approx(1.0, abs=1e-4)
    assert noise_multiplier(target_epsilon=1.0, sampling=Fixed(1), steps=1, delta=DELTA) == pytest.approx(
        3.7306, abs=1e-3
    )


def test_a_pass_in_fixed_batches_is_one_release_for_each_sample():
    run = {"noise_multiplier": 2.0, "delta": DELTA, "sampling": Fixed(steps_per_epoch=10)}
    one, two = epsilon(**run, steps=1), epsilon(**run, steps=11)
    assert one == epsilon(**run, steps=10) and two == epsilon(**run, steps=20)
    accountant = pld.PLDAccountant()
    accountant.compose(dp.GaussianDpEvent(2.0), 2)
    assert two == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9) and two > one


def test_a_pass_counts_at_its_faintest_noise():
    """Shuffled, a sample may be in any step of a pass: here in the seventh and the twelfth."""
    run = {"delta": DELTA, "sampling": Fixed(steps_per_epoch=10)}
    found = epsilon(noise_multiplier=[(10.0, 5), (0.5, 10), (10.0, 5)], **run)
    assert found == pytest.approx(epsilon(noise_multiplier=0.5, steps=20, **run), rel=1e-6)
    assert by_pass([(1.0, 3), (2.0, 4), (3.0, 25), (4.0, 8)], 10) == [(1.0, 1), (3.0, 3)]
    assert by_pass([(1.0, 5), (2.0, 2), (3.0, 1), (0.5, 2), (4.0, 11)], 10) == [(0.5, 1), (4.0, 2)]


@given(st.lists(st.tuples(st.floats(0.1, 9), st.integers(0, 25)), max_size=6), st.integers(1, 12))
def test_passes_of_any_schedule(schedule, steps_per_epoch):
    each = [sigma for sigma, steps in schedule for _ in range(steps)]
    wanted = [min(each[at : at + steps_per_epoch]) for at in range(0, len(each), steps_per_epoch)]
    found = by_pass(schedule, steps_per_epoch)
    assert [sigma for sigma, passes in found for _ in range(passes)] == wanted


def test_drawing_without_replacement_moves_a_sum_by_two_bounds():
    run = {"noise_multiplier": 3.0, "delta": DELTA, "accountant": "rdp", "steps": 50}
    accountant = rdp.RdpAccountant(neighboring_relation=REPLACE_ONE)
    accountant.compose(dp.SampledWithoutReplacementDpEvent(1000, 20, dp.GaussianDpEvent(1.5)), 50)
    found = epsilon(**run, sampling=WithoutReplacement(20, 1000))
    assert found == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    whole = rdp.RdpAccountant(neighboring_relation=REPLACE_ONE)
    whole.compose(dp.GaussianDpEvent(1.5), 50)
    assert epsilon(**run, sampling=WithoutReplacement(10, 10)) == pytest.approx(whole.get_epsilon(DELTA), rel=1e-6)
    assert found > epsilon(**run, sampling=Poisson(0.02))


def test_a_cap_costs_something_and_one_that_never_counts_nothing():
    run = {"noise_multiplier": 1.0, "delta": DELTA, "steps": 100}
    plain = epsilon(**run, sample_rate=0.02)
    assert epsilon(**run, sampling=TruncatedPoisson(0.02, cap=1000, sample_size=1000)) == pytest.approx(plain, rel=1e-6)
    assert epsilon(**run, sampling=TruncatedPoisson(0.02, cap=25, sample_size=1000)) > 1.05 * plain


def test_a_schedule_is_the_sum_of_its_parts():
    run = {"sample_rate": 0.02, "delta": DELTA}
    accountant = pld.PLDAccountant()
    for sigma, steps in ((1.0, 30), (2.0, 70)):
        accountant.compose(dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(sigma)), steps)
    found = epsilon(noise_multiplier=[(1.0, 30), (2.0, 70)], **run)
    assert found == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    assert found == epsilon(noise_multiplier=[(1.0, 30), (2.0, 70)], steps=100, **run)
    with pytest.raises(OptionError, match="steps=90"):
        epsilon(noise_multiplier=[(1.0, 30), (2.0, 70)], steps=90, **run)


def test_no_noise_and_no_steps():
    run = {"sample_rate": 0.02, "delta": DELTA}
    assert epsilon(noise_multiplier=0.0, steps=1, **run) == math.inf
    assert epsilon(noise_multiplier=[(1.0, 5), (0.0, 1)], **run) == math.inf
    assert epsilon(noise_multiplier=0.0, steps=0, **run) == epsilon(noise_multiplier=1.0, steps=0, **run) == 0.0
    assert noise_multiplier(target_epsilon=1.0, steps=0, **run) == 0.0


@pytest.mark.parametrize(
    "target, run",
    [
        (1.0, {"sampling": Poisson(0.01), "steps": 500}),
        (2.0, {"sampling": Fixed(10), "steps": 25}),
        (3.0, {"sampling": WithoutReplacement(20, 1000), "steps": 50, "accountant": "rdp"}),
    ],
    ids=str,
)
def test_noise_is_enough_and_no_more(target, run):
    sigma = noise_multiplier(target_epsilon=target, delta=DELTA, **run)
    assert epsilon(noise_multiplier=sigma, delta=DELTA, **run) <= target
    assert epsilon(noise_multiplier=sigma * (1 - 2e-6), delta=DELTA, **run) > target


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sample_rate": 1.5}, r"rate=1.5 .*\(0, 1\]"),
        ({"sample_rate": 0.0}, "rate=0.0"),
        ({"sample_rate": None}, "give either sample_rate.* none is given"),
        ({"sampling": Fixed(3)}, "give either sample_rate.* both is given"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"steps": None}, "steps is missing"),
        ({"steps": -1}, "steps=-1"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": 1e-3}, "noise_multiplier=0.001 is less than 0.05"),
        ({"noise_multiplier": (1.0, 100)}, "a list of pairs"),
        ({"noise_multiplier": [(1.0, 2, 3)]}, "a list of pairs"),
        ({"accountant": "prv"}, "accountant='prv'"),
    ],
)
def test_bad_input_is_named(change, words):
    run = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 10, "delta": DELTA, **change}
    with pytest.raises(OptionError, match=words):
        epsilon(**run)


def test_what_an_accountant_does_not_know_is_refused():
    with pytest.raises(OptionError, match="'pld' knows no bound for WithoutReplacement sampling; allowed: rdp"):
        epsilon(noise_multiplier=1.0, sampling=WithoutReplacement(2, 10), steps=1, delta=DELTA)
    with pytest.raises(OptionError, match="'rdp' knows no bound for TruncatedPoisson"):
        epsilon(noise_multiplier=1.0, sampling=TruncatedPoisson(0.1, 2, 10), steps=1, delta=DELTA, accountant="rdp")
    with pytest.raises(OptionError, match="at most sample_size, 10"):
        WithoutReplacement(11, 10)


def test_a_target_that_no_noise_reaches():
    with pytest.raises(OptionError, match="target_epsilon=1e-07 cannot be reached in 100 steps"):
        noise_multiplier(target_epsilon=1e-7, sample_rate=1.0, steps=100, delta=1e-12)


def test_a_target_that_every_noise_reaches():
    assert noise_multiplier(target_epsilon=1e9, sample_rate=1e-4, steps=1, delta=DELTA, accountant="rdp") == 0.05
    with pytest.raises(OptionError, match="delta=None"):
        noise_multiplier(target_epsilon=1.0, sample_rate=0.01, steps=0, delta=None)


def test_a_delta_that_would_allow_publishing_samples():
    with pytest.warns(UserWarning, match=r"at least one over the number of samples \(100\)"):
        epsilon(noise_multiplier=1.0, sampling=Poisson(0.1, sample_size=100), steps=1, delta=0.01)


RUN = ["--steps", "100", "--delta", "1e-5"]


@pytest.mark.parametrize(
    "arguments, sampling",
    [
        (["--sample-rate", "0.02"], Poisson(0.02)),
        (["--sample-rate", "0.02", "--sample-size", "1000"], Poisson(0.02, 1000)),
        (["--sample-rate", "0.02", "--cap", "25", "--sample-size", "1000"], TruncatedPoisson(0.02, 25, 1000)),
        (["--steps-per-epoch", "10"], Fixed(10)),
        (["--batch-size", "20", "--sample-size", "1000", "--accountant", "rdp"], WithoutReplacement(20, 1000)),
    ],
)
def test_the_command_says_what_the_function_does(arguments, sampling, capsys):
    accountant = "rdp" if "rdp" in arguments else "pld"
    assert main(["epsilon", "--noise-multiplier", "1.5", *RUN, *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = {"steps": 100, "delta": 1e-5, "sampling": sampling, "accountant": accountant}
    assert found["epsilon"] == epsilon(noise_multiplier=1.5, **run)
    assert found["adjacency"] == sampling.adjacency and found["sampling"] == str(sampling)


def test_the_command_finds_noise_and_prints_a_table(capsys):
    assert main(["noise", "--target-epsilon", "2", *RUN, "--steps-per-epoch", "50"]) == 0
    shown = capsys.readouterr().out
    sigma = noise_multiplier(target_epsilon=2.0, steps=100, delta=1e-5, sampling=Fixed(50))
    assert f"{sigma:.6g}" in shown and "one sample whose gradient counts as zero" in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sample-rate", "2"], "rate=2.0"),
        ([], "how are samples drawn?"),
        (["--sample-rate", "0.1", "--steps-per-epoch", "3"], "--steps-per-epoch and --sample-rate contradict"),
        (["--batch-size", "3"], "sample_size=None"),
    ],
)
def test_the_command_refuses_with_the_argument(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["epsilon", "--noise-multiplier", "1.5", *RUN, *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_the_command_runs_as_a_program():
    command = [sys.executable, "-m", "flashdp_compile.command", "epsilon", "--noise-multiplier", "2", *RUN]
    done = subprocess.run([*command, "--sample-rate", "0.02", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["epsilon"] == epsilon(noise_multiplier=2.0, sample_rate=0.02, steps=100, delta=1e-5)
