"""The examples under other people's training loops, in their short form."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "needs"),
    [("hf_trainer", "transformers"), ("accelerate_loop", "accelerate"), ("lightning_loop", "lightning")],
)
def test_it_ends_with_its_budget(name, needs, monkeypatch, capsys):
    pytest.importorskip(needs)
    monkeypatch.setattr(sys, "argv", [name, "--short"])
    torch._dynamo.reset()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"(\d+) steps(?: in (\d+) micro-batches)?, epsilon ([\d.]+)", said)
    assert found, said
    steps, micro_batches, epsilon = found.groups()
    assert int(steps) == {"hf_trainer": 6, "accelerate_loop": 20, "lightning_loop": 8}[name]
    assert micro_batches is None or int(micro_batches) > int(steps)
    assert 0.9 < float(epsilon) / {"hf_trainer": 8, "accelerate_loop": 3, "lightning_loop": 3}[name] <= 1
