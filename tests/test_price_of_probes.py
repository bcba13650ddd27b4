"""What `explain` and the command line say about the number of probes."""

import json
import math

import pytest
import torch
from torch import nn

from flashdp_compile import OptionError, accounting, explain
from flashdp_compile.checks import PROBES
from flashdp_compile.command import main
from flashdp_compile.passes.price_of_probes import COUNTS
from flashdp_compile.passes.strategies.sketch import hutchinson

RUN = ["--sample-rate", "0.01", "--steps", "50", "--delta", "1e-5", "--target-epsilon", "2"]


def test_options_and_report_know_the_same_numbers():
    assert PROBES == COUNTS
    assert hutchinson(16) is hutchinson(16), "layers that share an input are found by their strategy"


def test_explain_shows_what_each_number_of_probes_takes():
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 80))
    found = explain(model, torch.randn(4, 9, 200), options={"norm": "hutchinson", "probes": 32}, quiet=True)
    prices = {price["probes"]: price for price in json.loads(found.to_json())["estimates"]}
    assert list(prices) == [*PROBES]
    assert [price["layers"] for price in prices.values()] == [2, 1, 0, 0, 0], "2 k (d + p) < d p"
    products = 2 * 4 * 9 * 200 * 300  # of the weighted sum
    assert prices[32]["flops"] == products + 4 * 4 * 9 * 32 * (200 + 300)
    assert prices[64]["noise"] == pytest.approx(math.sqrt(64 / 62))
    text = str(found)
    assert "ESTIMATED NORMS, BY THEIR PROBES" in text and "norms are estimated, so epsilon is that of" in text
    assert "ESTIMATED" not in str(explain(model, torch.randn(4, 9, 200), quiet=True))


def test_the_command_line_compares_numbers_of_probes(capsys, monkeypatch):
    monkeypatch.setattr("flashdp_compile.command.PROBES", (64,))
    assert main(["probes", *RUN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = {"sample_rate": 0.01, "steps": 50, "delta": 1e-5, "norm": "hutchinson", "probes": 64}
    assert accounting.epsilon(noise_multiplier=found["64_probes"], **run) == pytest.approx(2, rel=1e-4)
    assert found["64_probes_over_exact"] == found["64_probes"] / found["exact_norms"] > 1.01
    with pytest.raises(SystemExit):
        main(["probes", *RUN, "--probes", "64"])
    assert "leave it out" in capsys.readouterr().err


def test_a_run_without_an_end_has_no_price():
    from flashdp_compile import PrivacyEngine

    engine = PrivacyEngine(
        target_delta=1e-5,
        expected_batch_size=8,
        sample_size=800,
        noise_multiplier=1.0,
        options={"norm": "hutchinson", "probes": 16},
    )
    with pytest.raises(OptionError, match="a number of steps"):
        engine.inflation()
