"""Where each millisecond of a step goes: kernels by category, next to the plain compiled step of the same run.

Every run of benchmarks.step ends with a few profiled steps, after the timed ones; `python -m benchmarks.tables` prints
what they show. "idle" is the rest of a timed step, in which no kernel ran. Kernels of several streams may run at a
time, so that categories add up to more than a step, except for communication: see trace.py.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import trace
from benchmarks.results import Results, Run
from benchmarks.settings import Settings
from benchmarks.steps import Step, run_steps
from benchmarks.workloads import Batch

PROFILED = 3  # steps
KERNELS = 20  # that are named one by one
IDLE = "idle"
STEP, HOST = "step, without profiler", "host, to launch a step"


def profile(step: Step, batches: list[Batch], settings: Settings, median_ms: float) -> dict[str, Any]:
    """Milliseconds of one step by category, and of its largest kernels."""

    def run() -> None:
        run_steps(step, batches, PROFILED)
        settings.synchronise()

    return summary(record(run, settings.device), median_ms)


def record(run: Callable[[], None], device: str) -> list[trace.Work]:
    """What PROFILED steps do, which `run` takes and waits for."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return trace.work_of(json.loads(path.read_text())["traceEvents"])


def summary(work: list[trace.Work], median_ms: float, kernels: int = KERNELS) -> dict[str, Any]:
    """`categories` and `kernels` of a Run whose step takes `median_ms` without the profiler."""
    categories = trace.by_category(work, PROFILED)
    categories[IDLE] = max(0.0, median_ms - trace.busy_ms(work, PROFILED))
    return {
        "categories": {name: round(ms, 4) for name, ms in categories.items()},
        "kernels": trace.by_kernel(work, PROFILED)[:kernels],
    }


def table_rows(results: Results, workload: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows by category, STEP and HOST last: milliseconds, and for all but the plain step the difference.

    Raises:
        ValueError: the workload has no profile of the plain compiled step.
    """
    runs = [r for r in results.runs if r.workload == workload and r.categories]
    base = next((results.baseline(r) for r in runs), None)
    if base is None or not base.categories:
        raise ValueError(f"there is no profile of the plain compiled step of {workload}")
    runs = [base, *(r for r in runs if r != base and results.baseline(r) == base)]
    header = ["category", *(f"{r.implementation} ms" for r in runs)]
    names = {name: None for run in runs for name in run.categories}
    order = sorted(names, key=lambda name: -max(_more(base, run, name) for run in runs[1:] or runs))
    lines = [[name, *(_cell(base, run, name) for run in runs)] for name in order]
    total = [f"{r.median_ms:.2f}" + (f" ({r.median_ms - base.median_ms:+.2f})" if r != base else "") for r in runs]
    last = [[STEP, *total]]
    if any(r.host_ms is not None for r in runs):  # older results have none
        last.append([HOST, *("-" if r.host_ms is None else f"{r.host_ms:.2f}" for r in runs)])
    return header, [*lines, *last]


def _more(base: Run, run: Run, name: str) -> float:
    return run.categories.get(name, 0.0) - base.categories.get(name, 0.0)


def _cell(base: Run, run: Run, name: str) -> str:
    difference = "" if run == base else f" ({_more(base, run, name):+.2f})"
    return f"{run.categories.get(name, 0.0):.2f}{difference}"
