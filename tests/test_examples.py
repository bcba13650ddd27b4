"""The examples under other people's training loops, in their short form."""

import re
import runpy
import subprocess
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
    assert 0.9 < float(epsilon) / {"hf_trainer": 2, "accelerate_loop": 3, "lightning_loop": 3}[name] <= 1


PRETRAINING = {
    "two processes": [(2, [])],
    "goes on with fewer": [(2, ["--stop", "3"]), (1, ["--resume"])],
}


@pytest.mark.parametrize("runs", ["two processes", pytest.param("goes on with fewer", marks=pytest.mark.full)])
def test_pretraining_over_processes(runs, tmp_path):
    for processes, more in PRETRAINING[runs]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        own = [str(EXAMPLES / "pretrain_llama.py"), "--short", "--epsilon", "2", "--folder", str(tmp_path), *more]
        said = subprocess.run([*launcher, *own], capture_output=True, text=True, timeout=120)
        assert said.returncode == 0, said.stderr[-2000:]
    last = said.stdout.splitlines()[-1]
    found = re.fullmatch(r"step 6: held-out loss ([\d.]+), .*, epsilon ([\d.]+)", last)
    assert found and 4 < float(found[1]) < 6 and 1.8 < float(found[2]) <= 2, last
