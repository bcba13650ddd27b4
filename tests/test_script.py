"""`flashdp explain script.py`: the first model that a script trains, explained and not trained."""

import json
import sys

import pytest

from flashdp_compile import OptionError
from flashdp_compile.command import main
from flashdp_compile.script import explain_script

SCRIPT = """
import sys, torch
from torch import nn
print("begun", sys.argv)
model = nn.Sequential(nn.Linear(8, 16), {layer}, nn.Linear(16, 1))
private = torch.compile(model, backend="flashdp", options={{"compiler": "eager", "max_grad_norm": 0.5}})
with torch.no_grad():
    private(torch.zeros(4, 8))
for _ in range(3):
    try:
        private(torch.randn(4, 8)).square().mean().backward()
    except Exception as error:
        raise SystemExit("a handler of the script's own was reached") from error
    raise SystemExit("trained")
"""


@pytest.fixture
def script(tmp_path):
    def write(layer="nn.Tanh()", text=SCRIPT):
        path = tmp_path / "train.py"
        path.write_text(text.format(layer=layer))
        return str(path)

    return write


def test_a_script_is_explained_and_not_trained(script, capsys):
    before = list(sys.argv), list(sys.path)
    path = script()
    assert main(["explain", path, "--epochs", "3"]) == 0
    shown = capsys.readouterr()
    assert "0.weight" in shown.out and "ACCEPTED" in shown.out and "clipped per sample to 0.5" in shown.out
    assert f"begun ['{path}', '--epochs', '3']" in shown.err and "begun" not in shown.out
    assert (sys.argv, sys.path) == before


def test_a_refusal_is_shown(script, capsys):
    assert main(["explain", "--json", script("nn.BatchNorm1d(16)")]) == 3
    found = json.loads(capsys.readouterr().out)
    assert "cannot prove that samples are independent" in found["refusal"] and found["region"]


def test_for_programs(script, capsys):
    assert main(["explain", "--json", script()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["refusal"] is None and found["sensitivity"] == 0.5
    assert [p["name"] for p in found["parameters"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_under_an_engine(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(
        """
import torch
from torch import nn
from flashdp_compile import PrivacyEngine, Quantile, accounting
engine = PrivacyEngine(target_delta=1e-5, noise_multiplier=1.0, expected_batch_size=4, bounds=Quantile(),
                       sampling=accounting.Fixed(10), options={"compiler": "eager"})
engine.compile(nn.Linear(8, 1))(torch.randn(4, 8)).square().mean().backward()
"""
    )
    _, found = explain_script(path)
    assert "the engine adds noise at each step" in str(found) and "bounds move" in str(found)


@pytest.mark.parametrize("text, said", [("print(1)", ""), ("import sys; sys.exit('no config')", r" \(no config\)")])
def test_a_script_that_trains_nothing(text, said, script):
    with pytest.raises(OptionError, match=f"ended without a backward that flashdp compiled{said}:"):
        explain_script(script(text=text))


def test_no_script(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["explain", "nowhere.py"])
    assert ended.value.code == 2 and "script='nowhere.py' is no file" in capsys.readouterr().err
