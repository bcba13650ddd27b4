"""The debug folder, explain(), and what both say when a model is refused."""

import json

import pytest
import torch
from small_models import Block
from torch import nn

import flashdp_compile
from flashdp_compile import explain
from flashdp_compile.errors import InternalError, OptionError, Refusal
from flashdp_compile.passes.dump import table
from zoo import Model

KEYS = {
    "batch", "inputs", "batch_dim", "axes", "parameters", "groups", "sensitivity", "slack", "choices", "options",
}  # fmt: skip


def centres_the_batch(m, x):
    h = m.fc(x)
    return h - h.mean(0)


def train(model, x, **options):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options={"compiler": "eager", **options})
    compiled(x).square().mean().backward()


class TestDebugFolder:
    def test_a_folder_for_every_graph(self, tmp_path):
        model, x = Block(), torch.randn(3, 4, 6)
        train(model, x, debug=str(tmp_path), norm_strategy="gram", clipping="per_layer", max_grad_norm=3.0, seed=1)
        (folder,) = tmp_path.iterdir()
        texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.*") if p.is_file()}
        assert set(texts) >= {
            "00_joint.py", "00_inputs.txt", "01_axes.txt", "02_points.txt", "03_plan.txt", "04_rewritten.py",
            "05_verified.txt", "report.json",
        }  # fmt: skip
        assert "error.txt" not in texts
        for name, text in texts.items():
            if name != "report.json":
                head = text.splitlines()[0]
                assert f"flashdp_compile {flashdp_compile.__version__}, torch {torch.__version__}" in head, name
                assert "small_models.py:" in head
            if name.endswith(".py"):
                compile(text, name, "exec")
        assert "flashdp" not in texts["00_joint.py"].split("\n", 1)[1]
        assert "flashdp.clip_factors" in texts["04_rewritten.py"] and "flashdp.add_noise" in texts["04_rewritten.py"]
        assert "weighted by" in texts["05_verified.txt"] and "weighted by" not in texts["01_axes.txt"]
        kernels = [n for n in texts if n.startswith("kernels/")]
        assert any("gram_sqnorm" in n for n in kernels) and any("weighted_matmul" in n for n in kernels)
        assert all("triton" in texts[n] for n in kernels)

        report = json.loads(texts["report.json"])
        assert set(report) >= KEYS
        assert report["batch"] == "3" and report["sensitivity"] == pytest.approx(3.0)
        assert [p["name"] for p in report["parameters"]] == [n for n, _ in model.named_parameters()]
        assert {g["name"] for g in report["groups"]} == {"norm", "up", "down"}
        assert report["options"]["max_grad_norm"] == 3.0
        chosen = {c["parameter"]: c["strategy"] for c in report["choices"]}
        assert chosen["up.weight"] == "gram" and chosen["norm.bias"] == "materialize"
        assert all("small_models.py:" in p["line"] for q in report["parameters"] for p in q["points"])

    def test_a_refused_graph_leaves_its_error(self, tmp_path):
        with pytest.raises(Refusal):
            train(Model(centres_the_batch, fc=nn.Linear(6, 5)), torch.randn(3, 6), debug=str(tmp_path))
        (folder,) = tmp_path.iterdir()
        names = {p.name for p in folder.iterdir()}
        assert {"error.txt", "00_joint.py", "00_inputs.txt", "01_axes.txt"} <= names
        assert "dim 0 = B" in (folder / "01_axes.txt").read_text()  # as far as the proof came
        assert not names & {"02_points.txt", "04_rewritten.py", "05_verified.txt", "report.json", "03_plan.txt"}
        text = (folder / "error.txt").read_text()
        assert "Refusal: flashdp cannot prove" in text and "centres_the_batch" in text

    def test_a_graph_that_failed_its_verification_is_there_to_be_looked_at(self, tmp_path, monkeypatch):
        def fails(*arguments):
            raise InternalError("the rewritten graph failed its own verification")

        monkeypatch.setattr(flashdp_compile.pipeline, "verify", fails)
        with pytest.raises(InternalError):
            train(nn.Linear(6, 5), torch.randn(3, 6), debug=str(tmp_path))
        (folder,) = tmp_path.iterdir()
        assert "flashdp.clip_factors" in (folder / "04_rewritten.py").read_text()
        assert "verification" in (folder / "error.txt").read_text()
        assert not (folder / "05_verified.txt").exists()

    def test_a_graph_without_backward_leaves_nothing(self, tmp_path):
        compiled = torch.compile(
            nn.Linear(6, 5), backend="flashdp", options={"compiler": "eager", "debug": str(tmp_path)}
        )
        with torch.no_grad():
            compiled(torch.randn(3, 6))
        assert not tmp_path.exists() or not list(tmp_path.iterdir())

    def test_the_environment_variable(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FLASHDP_DEBUG", str(tmp_path / "here"))
        train(nn.Linear(6, 5), torch.randn(3, 6))
        assert (next((tmp_path / "here").iterdir()) / "report.json").exists()

    def test_off_by_default(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        train(nn.Linear(6, 5), torch.randn(3, 6))
        assert not list(tmp_path.iterdir())


class TestExplain:
    def test_an_accepted_model(self, capsys):
        found = explain(Block(), torch.randn(3, 4, 6), options={"max_grad_norm": 2.0, "noise_multiplier": 0.5,
                                                               "expected_batch_size": 4})  # fmt: skip
        text = str(found)
        assert capsys.readouterr().out.strip() == text.strip()
        assert found.refusal is None
        for heading in ("INPUTS", "PARAMETERS", "PLAN", "ASSUMPTIONS", "ACCEPTED"):
            assert heading in text.splitlines()
        assert all(name in text for name, _ in Block().named_parameters())
        assert "loss lies outside of the compiled region" in text
        assert "clipped per sample to 2 in all (1 group(s))" in text
        assert f"standard deviation {0.5 * 2 * (1 + found.record.plan.slack) / 4:.6g}" in text

    def test_quiet(self, capsys):
        explain(nn.Linear(6, 5), torch.randn(3, 6), quiet=True)
        assert capsys.readouterr().out == ""

    def test_the_graph_is_not_changed_and_nothing_is_trained(self):
        model = Block()
        before = {n: p.clone() for n, p in model.named_parameters()}
        explain(model, torch.randn(3, 4, 6), quiet=True)
        assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())

    def test_a_refused_model(self):
        found = explain(Model(centres_the_batch, fc=nn.Linear(6, 5)), torch.randn(3, 6), quiet=True)
        assert isinstance(found.refusal, Refusal)
        text = str(found)
        assert "REFUSED" in text.splitlines() and "ACCEPTED" not in text and "PLAN" not in text
        assert "INPUTS" in text and "centres_the_batch" in text

    def test_as_json(self):
        accepted = json.loads(explain(Block(), torch.randn(3, 4, 6), quiet=True).to_json())
        assert set(accepted) >= (KEYS - {"options"}) | {"refusal", "assumptions"}
        assert accepted["refusal"] is None and accepted["assumptions"]
        refused = explain(Model(centres_the_batch, fc=nn.Linear(6, 5)), torch.randn(3, 6), quiet=True)
        assert "aten.sub" in json.loads(refused.to_json())["refusal"]

    def test_assumptions(self):
        model = Model(
            lambda m, x, mask: (m.fc(x) * mask * m.scale).square().mean(), fc=nn.Linear(6, 5), scale=torch.ones(5)
        )
        found = explain(
            model, torch.randn(3, 6), torch.ones(5), options={"public_inputs": ["mask", "args.1"]}, quiet=True
        )
        text = "\n".join(found.assumptions)
        assert "declared public" in text and "buffers hold no private data: scale" in text
        assert "the loss that leaves the region" in text and "batch's own size" in text

    def test_a_batch_of_one_has_no_plan_to_show(self):
        found = explain(nn.Linear(6, 5), torch.randn(1, 6), quiet=True)
        assert found.refusal is None and "ACCEPTED" in str(found) and "PLAN" not in str(found).splitlines()

    def test_unknown_options_are_raised(self):
        with pytest.raises(OptionError, match="noise_multiplier"):
            explain(nn.Linear(6, 5), torch.randn(3, 6), options={"noise": 1.0})


def test_tables_are_aligned_without_trailing_blanks():
    text = table(("a", "bb"), [("ccc", ""), (1, 2)])
    assert text == "a    bb\nccc\n1    2"
