"""Where each millisecond of a step goes, next to the plain compiled step, one process each.

    python -m benchmarks.profile --workload gpt2 --implementation flashdp-per_layer --out profile.json

Both steps pass their check first. Times are summed over kernels; "idle" is the rest of the step's time, measured
without the profiler, in which no kernel ran.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure, settings, trace
from benchmarks.environment import environment
from benchmarks.implementations import BASELINE, IMPLEMENTATIONS
from benchmarks.processes import call
from benchmarks.workloads import WORKLOADS

PROFILED = 3  # steps
IDLE = "idle"


def profile(workload: str, implementation: str, settings_: dict[str, Any]) -> dict[str, Any]:
    """The times of one implementation's step by category and by kernel."""
    own = settings.Settings(**settings_)
    step, batches, _, error, _ = measure.prepare(workload, implementation, own)
    measure.run_steps(step, batches, own.warmup)
    step_ms, _ = measure.timed_steps(step, batches, own)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if own.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        measure.run_steps(step, batches, PROFILED)
        own.synchronise()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        work = trace.work_of(json.loads(path.read_text())["traceEvents"])
    categories = trace.by_category(work, PROFILED)
    categories[IDLE] = max(0.0, median(step_ms) - sum(categories.values()))
    return {
        "environment": environment(own.device),
        "error": error,
        "median_ms": median(step_ms),
        "categories": categories,
        "kernels": trace.by_kernel(work, PROFILED),
    }


def differences(content: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(category, ms of the baseline, ms of the implementation), the largest increase first."""
    base, own = content["baseline"]["categories"], content["implementation"]["categories"]
    rows = [(name, base.get(name, 0.0), own.get(name, 0.0)) for name in {**base, **own}]
    return sorted(rows, key=lambda row: row[1] - row[2])


def table_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows by category, the whole step last; times in milliseconds."""
    header = ["category", f"{BASELINE} ms", f"{content['names']['implementation']} ms", "difference"]
    base, own = content["baseline"]["median_ms"], content["implementation"]["median_ms"]
    lines = [*differences(content), ("step, without profiler", base, own)]
    return header, [[name, f"{base:.2f}", f"{own:.2f}", f"{own - base:+.2f}"] for name, base, own in lines]


def tables(content: dict[str, Any], kernels: int = 25) -> list[Table]:
    """By category, and the largest kernels of the implementation."""
    name, environment_ = content["names"]["implementation"], content["implementation"]["environment"]
    (category, *columns), rows = table_rows(content)
    first = Table(category, title=f"{content['names']['workload']}; {environment_['device']}")
    for column in columns:
        first.add_column(column, justify="right")
    for row in rows:
        first.add_row(*row, end_section=row is rows[-2])
    second = Table("kernel", "category", title=f"the largest kernels of {name}")
    second.add_column("calls a step", justify="right")
    second.add_column("ms a step", justify="right")
    for row in content["implementation"]["kernels"][:kernels]:
        second.add_row(row["name"][:90], row["category"], f"{row['calls']:g}", f"{row['ms']:.3f}")
    return [first, second]


def main() -> None:
    arguments = parse()
    own = settings.from_arguments(arguments).record()
    content: dict[str, Any] = {
        "names": {"workload": arguments.workload, "implementation": arguments.implementation},
        "settings": own,
    }
    for role, implementation in (("baseline", BASELINE), ("implementation", arguments.implementation)):
        inputs = {"workload": arguments.workload, "implementation": implementation, "settings_": own}
        with tempfile.TemporaryDirectory(prefix="benchmark_caches_") as caches:
            content[role] = call("benchmarks.profile:profile", inputs, caches)
        if "failed" in content[role]:
            sys.exit(f"{implementation}: {content[role]['failed']}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 160).print(*tables(content))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--implementation", required=True, choices=IMPLEMENTATIONS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    settings.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
