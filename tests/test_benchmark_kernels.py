"""Kernel benchmarks and profiles on a CPU: wrong kernels that must be found, and traces that are sorted by category."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels, measure, planner, profile, trace
from benchmarks.implementations import BASELINE
from benchmarks.kernel_cases import SHAPES, KernelCase, cases
from benchmarks.results import Results, Run
from benchmarks.settings import Settings
from benchmarks.workloads import WORKLOADS

QUICK = Settings(device="cpu", dtype="fp32", compiler="eager", steps=2, warmup=1, pool=2)


def test_every_kernel_of_a_tiny_shape_is_right_and_timed():
    found = [kernels.measure(case, 1e9, "cpu") for case in cases(SHAPES["tiny"], "cpu")]
    assert {record["family"] for record in found} == {
        "gram_sqnorm",
        "outer_store",
        "weighted_matmul",
        "embedding_sqnorm",
        "embedding_sum",
        "add_noise",
        "product_sum",
    }
    assert all(record["ms"] > 0 and record["share"] == record["floor_ms"] / record["ms"] for record in found)
    content = {"environment": {"device": "", "torch": "", "triton": "", "commit": ""}, "copy_bandwidth": 1e9}
    assert kernels.table(content | {"kernels": found}).row_count == len(found)


@pytest.mark.parametrize("wrong", [lambda t: t * 1.01, lambda t: t * float("nan"), lambda t: t.roll(1)])
def test_a_wrong_kernel_is_not_timed(wrong, monkeypatch):
    for case in cases(SHAPES["tiny"], "cpu"):
        family = kernels.FAMILIES[case.family]

        def op(*arguments, family=family):
            *others, last = kernels._results(family.op(*arguments))
            return (*others, wrong(last))

        monkeypatch.setitem(kernels.FAMILIES, case.family, SimpleNamespace(op=op, reference=family.reference))
        record = kernels.measure(case, 1e9, "cpu")
        if case.family not in ("gram_sqnorm", "embedding_sqnorm") or wrong(torch.ones(2))[0] != 1.01:
            assert "failed" in record and "ms" not in record, case.family


def test_floors():
    compute = KernelCase("gram_sqnorm", "qkv", (), 1.3, flops=600e12, bytes=1)
    memory = KernelCase("gram_sqnorm", "qkv", (), 1.3, flops=1, bytes=3e12)
    copied = KernelCase("product_sum", "qkv", (), 1 / 0.8, bytes=8e12, memory_only=True)
    assert [case.roofline_s(4e12) for case in (compute, memory, copied)] == [1, 1, 2]


def _event(cat, name, ts, dur, external=None, tid=1):
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "tid": tid,
        "pid": 1,
        "args": {"External id": external},
    }


def test_kernels_are_put_down_to_the_ops_that_launched_them():
    """Times on the device overlap nothing on the CPU; only the ids connect them."""
    events = [
        {"ph": "M", "name": "process_name"},
        _event("user_annotation", "Optimizer.step#AdamW.step", 0, 10, 1),
        _event("cpu_op", "aten::_fused_adamw_", 1, 8, 2),
        _event("gpu_user_annotation", "Optimizer.step#AdamW.step", 1000, 500, 1),
        _event("kernel", "multi_tensor_apply_kernel", 1000, 400, 2),
        _event("cpu_op", "flashdp::gram_sqnorm", 20, 10, 3),
        _event("cpu_op", "aten::sum", 25, 5, 4),
        _event("kernel", "kernel", 1500, 300, 3),
        _event("kernel", "reduce_kernel", 1800, 100, 4),
        _event("cpu_op", "aten::mm", 20, 10, 5, tid=2),
        _event("kernel", "sm90_xmma_gemm_bf16", 1900, 200, 5),
        _event("kernel", "nvjet_tst_128x256", 2100, 50),
        _event("cpu_op", "triton_poi_fused_add_0", 40, 5, 6),
        _event("kernel", "triton_poi_fused_add_0", 2200, 70, 6),
        _event("kernel", "triton_red_fused_norm_1", 2300, 30, 99),
        _event("kernel", "void pytorch_flash::flash_fwd_kernel<...>", 2400, 20),
        _event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 2500, 10),
        _event("kernel", "something_else", 2600, 8),
    ]
    work = trace.work_of(events)
    assert trace.by_category(work, steps=2) == pytest.approx(
        {
            "optimizer": 0.2,
            "flashdp gram_sqnorm": 0.2,
            "matmul": 0.125,
            "inductor, pointwise": 0.035,
            "inductor, reductions": 0.015,
            "attention": 0.01,
            "copies and fills": 0.005,
            "other": 0.004,
        }
    )
    first, second = trace.by_kernel(work, steps=2)[:2]
    assert first == {"name": "multi_tensor_apply_kernel", "category": "optimizer", "calls": 0.5, "ms": 0.2}
    assert (second["name"], second["category"]) == ("kernel", "flashdp gram_sqnorm")


def test_communication_counts_where_nothing_else_runs():
    """Two of its kernels at a time, one beside the copies that prepare it, one beside a product that goes on behind."""
    events = [
        _event("cpu_op", "fsdp::chunk_cat", 0, 10, 1),
        _event("cpu_op", "record_param_comms", 10, 10, 2),
        _event("user_annotation", "nccl:_reduce_scatter_base", 11, 8, 3),
        _event("kernel", "cat_kernel", 1000, 100, 1),
        _event("kernel", "ncclDevKernel_ReduceScatter_Sum_f32", 1050, 250, 3),
        _event("gpu_memcpy", "Memcpy DtoD", 1250, 150, 2),
        _event("kernel", "ncclDevKernel_AllGather", 2000, 100),
        _event("kernel", "nvjet_tst", 2040, 200),
    ]
    work = trace.work_of(events)
    assert trace.busy_ms(work, steps=1) == pytest.approx(0.64)
    assert trace.by_category(work, steps=1) == pytest.approx(
        {trace.ALONE: 0.34, "matmul": 0.2, trace.HIDDEN: 0.16, "copies of shards": 0.1}
    )
    found = profile.summary(work * 3, median_ms=1.0)
    assert found["categories"][profile.IDLE] == pytest.approx(1 - 0.64 / 3, abs=1e-3)


def test_without_a_gpu_an_op_counts_without_those_inside_it():
    inner, outer = _event("cpu_op", "aten::mm", 2, 3, 2), _event("cpu_op", "flashdp::gram_sqnorm", 0, 10, 1)
    beside = _event("cpu_op", "aten::mm", 4, 4, 3, tid=2)
    assert trace.work_of([inner, outer, beside]) == [
        trace.Work("aten::mm", ("aten::mm", "flashdp::gram_sqnorm"), 3),
        trace.Work("flashdp::gram_sqnorm", ("flashdp::gram_sqnorm",), 7),
        trace.Work("aten::mm", ("aten::mm",), 4),
    ]


def test_profile_of_a_tiny_step():
    """The eager step stands for the plain compiled one."""
    runs: list[Run] = []
    for implementation, shown in (("eager", BASELINE), ("flashdp-flat", "flashdp-flat")):
        found = measure.prepare("tiny-gpt", implementation, QUICK)
        content = profile.profile(found.step, found.batches, QUICK, median_ms=1e4)
        assert sum(content["categories"].values()) == pytest.approx(1e4, abs=0.1)
        assert 0 < sum(record["ms"] for record in content["kernels"]) < 1e4 - content["categories"]["idle"] + 0.1
        runs.append(Run(workload="tiny-gpt", implementation=shown, status="ok", median_ms=1e4, **content))
    base, own = (run.categories for run in runs)
    assert "flashdp add_noise" not in base and own["flashdp add_noise"] > 0
    assert base["matmul"] > 0 and base["optimizer"] > 0
    results = Results(environment={}, settings={}, runs=runs)
    header, rows = profile.table_rows(results, "tiny-gpt")
    assert header == ["category", "compile ms", "flashdp-flat ms"]
    assert {row[0] for row in rows} == {*base, *own, "step, without profiler"}
    cells = dict(zip((row[0] for row in rows), rows, strict=True))["flashdp add_noise"]
    assert cells[1:] == ["0.00", f"{own['flashdp add_noise']:.2f} (+{own['flashdp add_noise']:.2f})"]
    assert rows[-1][1:] == ["10000.00", "10000.00 (+0.00)"]
    results.runs[1] = replace(results.runs[1], host_ms=measure.launched_ms(found.step, found.batches, QUICK))
    _, (*_, host) = profile.table_rows(results, "tiny-gpt")
    assert host == [profile.HOST, "-", f"{results.runs[1].host_ms:.2f}"] and 0 < results.runs[1].host_ms < 1e4
    with pytest.raises(ValueError, match="no profile of the plain compiled step of gpt2"):
        profile.table_rows(results, "gpt2")


def test_predictions_are_compared_with_times(monkeypatch):
    """Three layers of which each is timed at what the prediction does not expect."""
    times = {"gram": 3e-3, "outer": 2e-3, "store": 4e-3, "materialize": 5e-3}
    watch = lambda strategy, factors: strategy.trial and times[strategy.name]  # noqa: E731
    monkeypatch.setattr(planner.autotune, "timer", lambda digest: watch)
    workload = replace(WORKLOADS["tiny-gpt"], size={**WORKLOADS["tiny-gpt"].size, "layers": 3})
    found = planner.points(workload, "cpu")
    layers = {point["layer"]: point["layers"] for point in found}
    assert layers["head.weight"] == 1 and {n for name, n in layers.items() if name != "head.weight"} == {3}
    assert {tuple(point["sizes"][:2]) for point in found} == {(workload.batch, workload.length)}
    for point in found:
        assert point["measured"] == times and point["predicted"].keys() == times.keys()
        assert point["faster"] == "outer" or point["clipping"] == "flat"
        assert planner.loss(point) == point["layers"] * (times[point["taken"]] - times[point["faster"]])
    by_hand = [abs(p["predicted"][n] / times[n] - 1) for p in found if p["clipping"] == "flat" for n in times]
    assert planner.error(found) == pytest.approx(sum(by_hand) / len(by_hand))
    assert planner.table(found).row_count == len(found) == 2 * len(layers)
