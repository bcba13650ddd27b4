"""The benchmarks on a CPU: tiny workloads, wrong gradients that must be found, files that become tables and plots."""

import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reference
from benchmarks import check, measure, peak, plot, rounds, scaling, sharded, step, tables, trace
from benchmarks.implementations import BASELINE, IMPLEMENTATIONS
from benchmarks.processes import call
from benchmarks.results import Results, Run
from benchmarks.rounds import ALONE, Place
from benchmarks.settings import Settings
from benchmarks.steps import FlashDPStep, Step
from benchmarks.targets import TARGETS, met
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
QUICK = Settings(device="cpu", dtype="fp32", compiler="eager", steps=2, warmup=1, pool=2)
TINY = WORKLOADS["tiny-gpt"]
PAGES = ("performance.md", "performance-log.md", "measuring.md")


def expected(clipping, settings=QUICK, workload=TINY):
    model, (batch,) = workload.model(), workload.batches(1, "cpu")
    return check.expected_gradients(model, batch, clipping, settings.max_grad_norm, settings.autocast)


@pytest.mark.parametrize(
    "workload, implementation, dtype",
    [
        ("tiny-gpt", "compile", "fp32"),
        ("tiny-vit", "flashdp-per_layer", "fp32"),
        ("tiny-llama", "flashdp-per_layer", "bf16"),
    ],
)
def test_a_right_step_is_timed(workload, implementation, dtype):
    found = measure.measure(workload, implementation, replace(QUICK, dtype=dtype).record())
    assert len(found["step_ms"]) == QUICK.steps and min(found["step_ms"]) > 0
    assert found["environment"]["torch"] == torch.__version__
    assert found["error"] < 2e-2
    json.dumps(found)


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-llama", "tiny-vit"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", None])
def test_the_reference_is_that_of_the_exactness_tests(name, clipping):
    workload, bound = WORKLOADS[name], 0.9
    model, (batch,) = workload.model(), workload.batches(1, "cpu")
    names, parameters = zip(*model.named_parameters(), strict=True)
    per_sample = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in model(*batch)]
    gradients = {n: torch.stack(parts).double() for n, parts in zip(names, zip(*per_sample, strict=True), strict=True)}
    released = reference.release(gradients, clipping=clipping or "flat", max_grad_norm=bound if clipping else 1e9)
    assert clipping is None or (released.factors < 1).any()
    found = check.expected_gradients(model, batch, clipping, bound, QUICK.autocast)
    assert max(reference.relative_errors(found, released.gradients).values()) < 1e-5


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    """One small parameter of many, by a thousandth."""
    gradients = Step.gradients

    def wrong(self):
        found = gradients(self)
        return found | {"norm.bias": found["norm.bias"] * 1.001}

    monkeypatch.setattr(Step, "gradients", wrong)
    with pytest.raises(check.CheckFailed, match="norm.bias is off by 1.00e-03, .*; allowed: 1.00e-04"):
        measure.measure("tiny-gpt", "eager", QUICK.record())


def test_a_gradient_that_is_missing_or_not_finite_is_found():
    gradients = expected(None)
    rounding = dict.fromkeys(gradients, 0.0)
    assert check.check(gradients, gradients, rounding, 1e-6)[0] == 0
    for wrong in (0.0, float("nan")):
        for name in gradients:
            with pytest.raises(check.CheckFailed, match=name):
                check.check(gradients | {name: gradients[name] * wrong}, gradients, rounding, 2e-2)


def test_what_16_bits_round_away_in_the_reference_is_no_error_of_a_step():
    """Up to a quarter more of it, parameter by parameter, and never less than the tolerance."""
    right = expected(None)
    rounding, off = dict.fromkeys(right, 0.0), {}
    for name, g in right.items():
        across = torch.randn_like(g)
        across -= (across * g).sum() / g.square().sum() * g
        off[name] = across * (g.norm() / across.norm())

    def moved(by: dict[str, float]) -> dict:
        return {name: g + by.get(name, 0.0) * off[name] for name, g in right.items()}

    largest = max(right, key=lambda name: float(right[name].norm()))
    plain = moved({largest: 0.03})
    assert check.check(moved({largest: -0.036}), right, rounding, 2e-2, plain)[1] == largest
    for wrong in ({largest: 0.039}, {name: 0.021 for name in right if name != largest}):
        with pytest.raises(check.CheckFailed):
            check.check(moved(wrong), right, rounding, 2e-2, plain)
    with pytest.raises(check.CheckFailed, match="3.60e-02, .* of it along itself; allowed: 2.00e-02"):
        check.check(moved({largest: 0.036}), right, rounding, 2e-2)
    with pytest.raises(check.CheckFailed, match="6.00e-02, .* allowed: 5.00e-02"):
        check.check(moved({largest: 0.06}), right, rounding, 2e-2, moved({largest: 0.3}))


@pytest.mark.parametrize("wrong", ["scale", "sample"])
def test_no_rounding_of_the_reference_excuses_a_wrong_scale_or_a_sample_less(wrong):
    right = expected(None)
    model, (batch,) = TINY.model(), TINY.batches(1, "cpu")
    plain = {name: g + 0.04 * g.norm() * torch.randn_like(g) / g.numel() ** 0.5 for name, g in right.items()}
    less = check.expected_gradients(model, tuple(part[1:] for part in batch), None, 1.0)
    size = len(batch[0])
    actual = {n: g * 1.03 if wrong == "scale" else less[n] * ((size - 1) / size) for n, g in right.items()}
    with pytest.raises(check.CheckFailed, match="along itself"):
        check.check(actual, right, dict.fromkeys(right, 0.0), 2e-2, plain)


def test_the_reference_sums_in_float32_and_puts_the_setting_back(monkeypatch):
    seen, matmul = [], torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    autocast = QUICK.autocast

    def watched():
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        return autocast()

    batch = TINY.batches(1, "cpu")[0]
    check.expected_gradients(TINY.model(), batch, None, 1.0, watched)
    assert before and set(seen) == {False}
    assert matmul.allow_bf16_reduced_precision_reduction == before


def test_a_wrong_private_step_is_found(monkeypatch):
    """The groups, the bound, the weights of samples and the noise of one compiled step, each against another claim."""
    batch = TINY.batches(1, "cpu")[0]
    private = FlashDPStep(TINY.model(), "per_layer", TINY.batch, QUICK)
    observed = private.observe(batch)
    right = expected("per_layer")
    assert check.check(observed.gradients, right, observed.rounding, QUICK.tolerance)[0] < 1e-3
    first = TINY.batches(2, "cpu")[1]
    other_batch = check.expected_gradients(TINY.model(), first, "per_layer", 1.0, QUICK.autocast)
    for wrong in (
        expected("flat"),
        expected(None),
        expected("per_layer", replace(QUICK, max_grad_norm=1.03)),
        other_batch,
    ):
        with pytest.raises(check.CheckFailed):
            check.check(observed.gradients, wrong, observed.rounding, 2e-2)
    private.deviation *= 1.1
    with pytest.raises(check.CheckFailed, match="the noise of .* has deviation 0.2"):
        private.observe(batch)


@pytest.mark.parametrize("wrong", ["missing", "less", "shared"])
def test_noise_that_is_wrong_for_one_parameter_is_found(wrong):
    """However few elements it has, next to a table."""
    torch.manual_seed(0)
    noise = {"table": 0.25 * torch.randn(1000, 64), "bias": 0.25 * torch.randn(64), "scale": 0.25 * torch.randn(64)}
    check.check_noise(noise, 0.25)
    noise["bias"] = {"missing": torch.zeros(64), "less": noise["bias"] / 2, "shared": noise["scale"]}[wrong]
    with pytest.raises(check.CheckFailed, match="the noise of (bias|scale)"):
        check.check_noise(noise, 0.25)


def test_dropped_samples_are_found():
    private = FlashDPStep(TINY.model(), "flat", TINY.batch, QUICK)
    batch = TINY.batches(1, "cpu")[0]
    private.observe(batch)
    assert private.complaint() is None
    (private.losses(batch) * float("inf")).sum().backward()
    assert "samples were dropped" in private.complaint()


def test_the_workloads_have_the_sizes_of_their_names():
    """Parameters in millions; the head of a GPT-2 is counted beside its embedding."""
    sizes = {"gpt2": 124.4 + 38.6, "gpt2-large": 774.0 + 64.3, "llama-1b": 953.2, "vit-b16": 86.6}
    for name, millions in sizes.items():
        model = WORKLOADS[name].model(device="meta")
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    untimed = re.compile("tiny|.*-(64|96|128)k")  # these tell what fits
    assert TARGETS.keys() == {name for name in WORKLOADS if not untimed.match(name)}
    assert all(pair.keys() <= IMPLEMENTATIONS.keys() for pair in TARGETS.values())


def test_batches_are_random_and_the_same_every_time():
    for workload in (WORKLOADS[name] for name in ("tiny-gpt", "tiny-llama", "tiny-vit")):
        first, second = workload.batches(2, "cpu")
        again = workload.batches(2, "cpu")[1]
        assert not torch.equal(first[0], second[0]) and first[0].count_nonzero() > 0.8 * first[0].numel()
        assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
        assert workload.model()(*first).shape == (workload.batch,)


@pytest.fixture
def results():
    """Two workloads; the second has no baseline."""
    ok = {"status": "ok", "shapes": TINY.shapes(), "compile_s": 12.3, "warm_s": 4.56, "error": 3e-4}
    gib = 2**30
    return Results(
        environment={"device": "a device", "torch": "2.11", "commit": "abc"},
        settings=QUICK.record(),
        runs=[
            Run(
                workload="gpt2", implementation=BASELINE, step_ms=[9.0, 10, 11], median_ms=10, peak_bytes=4 * gib, **ok
            ),
            Run(workload="gpt2", implementation="flashdp-flat", median_ms=12.5, peak_bytes=5 * gib, **ok),
            Run(workload="gpt2", implementation="flashdp-per_layer", median_ms=10, peak_bytes=4 * gib, **ok),
            Run(workload="gpt2", implementation="opacus-ghost", status="skipped", reason="opacus is not installed"),
            Run(workload="vit-b16", implementation=BASELINE, status="failed", reason="CheckFailed: off"),
            Run(workload="vit-b16", implementation="flashdp-flat", median_ms=5, peak_bytes=gib, **ok),
        ],
    )


def test_json_becomes_table_and_plot(results, tmp_path):
    results.save(tmp_path / "r.json")
    loaded = Results.load(tmp_path / "r.json")
    assert loaded == results
    rows = tables.rows(loaded)
    assert rows[0][2:] == ["10.0 ±0.8", "1.000", "-", "4.0", "1.00", "-", "12", "4.6", "3e-04"]
    assert rows[1][2:8] == ["12.5", "0.800", "0.97", "5.0", "1.25", "1.20"]
    assert [met(loaded, run) for run in loaded.runs] == [None, False, True, None, None, None]
    assert rows[3][2] == "skipped: opacus is not installed"
    assert rows[4][2] == "failed: CheckFailed: off" and not any(rows[4][3:])
    assert rows[5][3] == rows[5][6] == "-", "no ratio without a baseline of the same workload"
    assert tables.terminal(loaded).row_count == len(rows)
    assert all(len(line) == len(tables.HEADER) for line in rows)

    plot.draw(loaded, tmp_path / "r.svg")
    picture = (tmp_path / "r.svg").read_text()
    assert "0.80" in picture and "flashdp-flat" in picture and "vit-b16" not in picture
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="format 1"):
        Results.load(tmp_path / "other.json")


def test_a_failed_run_has_no_times(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "call", lambda *arguments: {"failed": "CheckFailed: off"})
    found = step.run("tiny-gpt", "eager", QUICK, False, Results(environment={}, settings={}), tmp_path)
    assert (found.status, found.reason, found.median_ms, found.step_ms) == ("failed", "CheckFailed: off", None, [])


def test_figures_of_two_machines_do_not_meet(monkeypatch, tmp_path):
    environments = iter(
        [{"device": "one", "date": "1"}, {"device": "one", "date": "2"}, {"device": "two", "date": "2"}]
    )
    monkeypatch.setattr(step, "call", lambda *arguments: {"environment": next(environments), "median_ms": 1.0})
    together = Results(environment={}, settings={})
    for _ in range(2):
        assert step.run("tiny-gpt", "eager", QUICK, False, together, tmp_path).status == "ok"
    with pytest.raises(RuntimeError, match="changed between runs"):
        step.run("tiny-gpt", "eager", QUICK, False, together, tmp_path)


def test_the_command(monkeypatch, tmp_path):
    """The step in one process, the warm start in a second; without code generation, which takes a minute here."""
    out = tmp_path / "results.json"
    names = ["--workloads", "tiny-gpt", "--implementations", "compile", "--compiler", "eager"]
    options = ["--steps", "2", "--warmup", "1", "--device", "cpu", "--warm", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["step", *names, *options])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 0
    (run,) = Results.load(out).runs
    assert run.status == "ok" and len(run.step_ms) == 2 and run.shapes["vocabulary"] == 61
    assert run.warm_s > 0 and run.compile_s > 0
    assert run.warm["phases"] and "caches" in run.warm
    assert run.error < 1e-4


def test_runs_of_a_round_are_timed_when_all_are_ready_or_have_ended(monkeypatch, tmp_path):
    """Side by side, none of them timed while another compiles; results in the order that was asked for."""
    log, lock = [], threading.Lock()

    def call(function, arguments, caches):
        place = Place(**arguments["place"])
        time.sleep(0.3 if place.name.endswith("eager") else 0.0)
        with lock:
            log.append(("ready", place.name))
        if place.name.endswith("compile-graphs"):
            return {"failed": "no graphs here"}
        with place.turn():
            with lock:
                log.append(("starts", place.name))
            time.sleep(0.05)
            with lock:
                log.append(("ends", place.name))
        return {"environment": {"device": "one", "date": "today"}, "median_ms": 1.0}

    out, names = tmp_path / "results.json", ["eager", "compile", "compile-graphs"]
    monkeypatch.setattr(step, "call", call)
    options = ["--steps", "2", "--device", "cpu", "--at-once", "3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["step", "--workloads", "tiny-gpt", "--implementations", *names, *options])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 1
    assert [(r.implementation, r.status) for r in Results.load(out).runs] == [
        ("eager", "ok"),
        ("compile", "ok"),
        ("compile-graphs", "failed"),
    ]
    assert [what for what, _ in log] == ["ready"] * 3 + ["starts", "ends"] * 2
    assert log[3][1] == log[4][1]


def test_a_warm_start_is_timed_in_a_process_of_its_own(monkeypatch, tmp_path):
    measured = {"environment": {"device": "one"}, "median_ms": 1.0, "compile_s": 0.5}
    answers = {"measure": measured, "first_step": {"seconds": 0.25, "caches": {"autograd_cache_hit": 1}}}
    called = []

    def call(function, arguments, caches):
        called.append(function.partition(":")[2])
        return dict(answers[called[-1]])

    monkeypatch.setattr(step, "call", call)
    run = step.run("tiny-gpt", "compile", QUICK, True, Results(environment={}, settings={}), tmp_path)
    assert called == ["measure", "first_step"]
    assert (run.compile_s, run.warm_s, run.warm) == (0.5, 0.25, {"caches": {"autograd_cache_hit": 1}})


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_the_nearest_sum_of_the_samples_gradients(clipping):
    """Any weights of samples, one for each group, are found; what belongs to no sample is left over."""
    model, (batch,) = TINY.model(), TINY.batches(1, "cpu")
    samples = [check.expected_gradients(model, tuple(p[i : i + 1] for p in batch), None, 1.0) for i in range(4)]
    weigh = {n: torch.rand(4) for n in ({"all"} if clipping == "flat" else {n.rpartition(".")[0] for n in samples[0]})}
    summed = {
        n: sum(
            w * own[n]
            for w, own in zip(weigh["all" if clipping == "flat" else n.rpartition(".")[0]], samples, strict=True)
        )
        for n in samples[0]
    }
    nearest = check.combination(model, batch, clipping, summed)
    assert check.check(nearest, summed, dict.fromkeys(summed, 0.0), 1e-4)[0] < 1e-4
    strange = {n: g + 0.1 * g.norm() * torch.randn_like(g) / g.numel() ** 0.5 for n, g in summed.items()}
    with pytest.raises(check.CheckFailed):
        check.check(strange, check.combination(model, batch, clipping, strange), dict.fromkeys(summed, 0.0), 2e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_estimates_that_do_more_than_weigh_samples_are_not_timed(monkeypatch, dtype):
    """A block of the gradient off by a tenth: less than what the weights of samples may be off by."""
    own = replace(QUICK, dtype=dtype, max_grad_norm=0.1)
    measure.prepare("tiny-llama", "flashdp-per_layer-probes", own)
    observe = FlashDPStep.observe

    def wrong(self, batch):
        found = observe(self, batch)
        found.gradients["blocks.0.up.weight"][:8] *= 0.9
        return found

    monkeypatch.setattr(FlashDPStep, "observe", wrong)
    with pytest.raises(check.CheckFailed, match="blocks.0.up.weight is off by"):
        measure.prepare("tiny-llama", "flashdp-per_layer-probes", own)


def test_a_shallow_check_is_of_one_block_and_finds_what_is_wrong(monkeypatch):
    own, seen = replace(QUICK, shallow=True), []
    gradients = Step.gradients

    def watched(self):
        seen.append(len(self.model.blocks))
        return gradients(self)

    deep = replace(TINY, size={**TINY.size, "layers": 2})
    monkeypatch.setitem(WORKLOADS, "tiny-gpt", deep)
    monkeypatch.setattr(Step, "gradients", watched)
    prepared = measure.prepare("tiny-gpt", "flashdp-flat", own)
    assert seen == [1, 1, 2, 2] and len(prepared.step.model.blocks) == 2
    monkeypatch.setattr(Step, "gradients", lambda self: {n: 1.01 * g for n, g in gradients(self).items()})
    with pytest.raises(check.CheckFailed):
        measure.prepare("tiny-gpt", "eager", own)


def test_a_shallow_check_does_not_excuse_the_whole_model(monkeypatch):
    """Nothing but the depth tells these two apart."""
    gradients = Step.gradients

    def none_at_depth(self):
        found = gradients(self)
        return {n: 0 * g for n, g in found.items()} if len(self.model.blocks) > 1 else found

    monkeypatch.setitem(WORKLOADS, "tiny-gpt", replace(TINY, size={**TINY.size, "layers": 2}))
    measure.prepare("tiny-gpt", "flashdp-flat", replace(QUICK, shallow=True))
    monkeypatch.setattr(Step, "gradients", none_at_depth)
    for implementation in ("eager", "flashdp-flat"):
        with pytest.raises(check.CheckFailed):
            measure.prepare("tiny-gpt", implementation, replace(QUICK, shallow=True))


def test_compilation_that_took_several_tries_has_no_time(monkeypatch):
    tries, seconds = [], measure._seconds

    def failing(*args):
        tries.append(1)
        if len(tries) == 2:
            raise torch.OutOfMemoryError
        return seconds(*args)

    monkeypatch.setattr(measure, "_seconds", failing)
    monkeypatch.setattr(rounds, "PAUSE_S", 0.0)
    prepared = measure.prepare("tiny-gpt", "eager", replace(QUICK, shallow=True), Place(size=2))
    assert len(tries) == 3 and prepared.first_step_s is None
    assert measure.prepare("tiny-gpt", "eager", replace(QUICK, shallow=True)).first_step_s > 0


def test_nobody_waits_for_a_round_that_is_over(monkeypatch, tmp_path):
    """Its folder is gone, or the process that would have left the last mark."""

    def call(*given):
        raise OSError("no space left")

    with pytest.raises(RuntimeError, match="has ended"), Place(str(tmp_path / "gone"), "one", 2).turn():
        pass
    results = Results(environment={}, settings={})
    monkeypatch.setattr(step, "call", call)
    with pytest.raises(OSError, match="no space left"):
        step.run("tiny-gpt", "eager", QUICK, False, results, tmp_path, Place(str(tmp_path), "one", 2))
    assert (tmp_path / "one.mark").exists()


def test_a_run_of_a_round_waits_for_memory_that_others_have(monkeypatch):
    monkeypatch.setattr(rounds, "PAUSE_S", 0.0)
    tried = []

    def call():
        tried.append(1)
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return "done"

    def never():
        tried.append(1)
        raise torch.OutOfMemoryError

    assert rounds.patiently(call, Place(size=2)) == "done"
    for place, times in ((ALONE, 1), (Place(size=2), rounds.TRIES + 1)):
        tried.clear()
        with pytest.raises(torch.OutOfMemoryError):
            rounds.patiently(never, place)
        assert len(tried) == times


def test_what_is_held_at_the_peak(tmp_path):
    """Generated code by its text, other code by its place; the allocator's other events are none of ours."""
    folder = tmp_path / "torchinductor_me"
    folder.mkdir()
    (folder / "code.py").write_text("first\n    buf3 = empty((4,))\n")
    library = {"filename": "/site-packages/torch/empty.py", "line": 1, "name": "empty"}
    generated = [library, {"filename": str(folder / "code.py"), "line": 2, "name": "call"}]
    ours = [library, {"filename": "/src/kernels/clip.py", "line": 7, "name": "launch"}, *generated]

    def event(action, addr, size, frames=()):
        return {"action": action, "addr": addr, "size": size, "frames": frames}

    events = [
        event("segment_alloc", 9, 1000),
        event("alloc", 1, 10, generated),
        event("alloc", 2, 30, ours),
        event("free_requested", 1, 10),
        event("free_completed", 1, 10),
        event("alloc", 1, 20, generated),
        event("free_completed", 7, 500),  # from before
        event("alloc", 3, 5, ours),
        event("free_completed", 2, 30),
        event("alloc", 4, 8, ours),
    ]
    assert peak.at_peak(events) == [(35, 2, "clip.py:7 launch"), (20, 1, "buf3 = empty((4,))")]
    assert peak.at_peak([]) == []


def test_a_process_tells_why_it_failed(tmp_path):
    found = call("benchmarks.check:check", {"actual": {}}, tmp_path)
    assert found["failed"].startswith("TypeError: check() missing")


def test_an_implementation_that_is_not_installed_is_skipped(monkeypatch, tmp_path):
    absent = replace(IMPLEMENTATIONS["opacus-ghost"], needs="no_such_module")
    monkeypatch.setitem(IMPLEMENTATIONS, "opacus-ghost", absent)
    found = step.run("tiny-gpt", "opacus-ghost", QUICK, False, Results(environment={}, settings={}), tmp_path)
    assert (found.status, found.reason) == ("skipped", "no_such_module is not installed")


@pytest.mark.parametrize("name", ["opacus-hooks", "opacus-ghost"])
@pytest.mark.parametrize("workload", ["tiny-gpt", "tiny-vit"])
def test_opacus(workload, name):
    pytest.importorskip("opacus")
    assert measure.measure(workload, name, QUICK.record())["error"] < 1e-4


def of_ranks(monkeypatch, folder, chosen):
    """What the command measures of the smallest model."""
    out = folder / "ranks.json"
    arguments = f"--models tiny --lengths 8 --batch 2 --steps 1 --warmup 1 --device cpu --compiler eager {chosen}"
    monkeypatch.setattr("sys.argv", ["sharded", *arguments.split(), "--out", str(out)])
    sharded.main()
    return Results.load(out).runs


@pytest.mark.full
def test_several_ranks(monkeypatch, tmp_path):
    """A model that is spread over two, and replicas."""
    names = ["flashdp-per_block", "ddp-flashdp-flat"]
    runs = of_ranks(monkeypatch, tmp_path, f"--ranks 2 --implementations {' '.join(names)}")
    assert [(run.status, run.implementation) for run in runs] == [("ok", name) for name in names]
    for run in runs:
        assert run.workload == "tiny, 2 x 2 x 8" and run.shapes["ranks"] == 2
        assert run.median_ms > 0 and trace.COMMUNICATION in run.categories and run.kernels


@pytest.mark.full
def test_one_of_several_ranks_alone(monkeypatch, tmp_path):
    (run,) = of_ranks(monkeypatch, tmp_path, "--ranks 4 --alone --implementations flashdp-per_block")
    assert (run.status, run.workload) == ("ok", "tiny, 1 of 4 x 2 x 8") and run.median_ms > 0


def test_what_ranks_gain():
    def run(implementation, ranks, ms):
        shapes = {"model": "m", "ranks": ranks, "batch": 8, "length": 16}
        return Run(
            workload=f"m, {ranks} x 8 x 16", implementation=implementation, status="ok", shapes=shapes, median_ms=ms
        )

    runs = [run("compile", 1, 90.0), run("flashdp-flat", 1, 96.0), run("compile", 4, 100.0)]
    runs += [run("flashdp-flat", 4, 120.0), run("flashdp-per_layer", 4, 120.0), run("ddp-flashdp-flat", 4, 50.0)]
    results = Results(environment={}, settings={}, runs=runs)
    header, lines = scaling.table_rows(results)
    assert all(len(line) == len(header) for line in lines)
    assert [line[2:] for line in lines] == [
        ["compile", "4", "100.0", "0.900", "1.000"],
        ["flashdp-flat", "4", "120.0", "0.800", "0.889"],
    ]
    assert results.speed(runs[3]) == pytest.approx(100 / 120)
    assert results.speed(runs[-1]) is None, "replicas are compared with replicas"
    results.runs = runs[:2]
    with pytest.raises(ValueError, match="on one rank and on several"):
        scaling.table_rows(results)


def test_the_page_shows_what_the_files_hold():
    docs = ROOT / "docs"
    shown: set[str] = set()
    for page in PAGES:
        text = (docs / page).read_text(encoding="utf-8")
        shown |= set(re.findall(r"<!-- (?:table|planner|kernels): (performance/\S+) -->", text))
        assert tables.fill(text, docs) == text, f"python -m benchmarks.tables docs/{page} writes it anew"
        assert tables.fill(text.replace(" | 1.000 | ", " | 1.001 | "), docs) == text
    assert shown == {f"performance/{path.name}" for path in docs.glob("performance/*.json")}
