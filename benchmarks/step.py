"""Whole training steps: implementations x workloads, one process each.

    python -m benchmarks.step --workloads gpt2 gpt2-padded --implementations compile flashdp-flat --out results.json

Every step's gradients are compared with a reference before it is timed; a step that fails has no times. Results are
saved after every run. The exit status is 1 if one of them failed.

With `--at-once N` all runs compile first, N at a time, and are timed afterwards, one by one: much sooner, but their
compile times are those of a busy machine.
"""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import settings
from benchmarks.fill import Job, fill, folder
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.processes import call
from benchmarks.results import Results, Run
from benchmarks.tables import terminal
from benchmarks.workloads import WORKLOADS


def run(
    workload: str,
    implementation: str,
    own: settings.Settings,
    warm: bool,
    results: Results,
    caches: Path,
    compile_s: float | None = None,
    turn: Path | None = None,
) -> Run:
    """One run in a process with these caches, which are empty unless `compile_s` tells what filling them took.

    `warm` adds another process that finds them filled, with what Inductor has tuned by timing kernels among them.
    A process imports its modules before its `turn`.
    """

    def outcome(status: str, **content: Any) -> Run:
        return Run(workload=workload, implementation=implementation, status=status, **content)

    if (reason := IMPLEMENTATIONS[implementation].missing()) is not None:
        return outcome("skipped", reason=reason)
    arguments = {"workload": workload, "implementation": implementation, "settings": own.record()}
    found = call("benchmarks.measure:measure", arguments, caches, turn)
    if "failed" in found:
        return outcome("failed", reason=found["failed"])
    environment = found.pop("environment")
    if results.environment and results.environment | {"date": environment["date"]} != environment:
        raise RuntimeError(f"device, versions or commit changed between runs: {results.environment}, {environment}")
    results.environment = environment
    if compile_s is not None:
        found["compile_s"] = compile_s
    if warm:
        again = call("benchmarks.measure:first_step", arguments, caches, turn)
        if "failed" in again:
            return outcome("failed", reason=f"warm start: {again['failed']}")
        found["warm_s"] = again.pop("seconds")
        found["warm"] = again
    return outcome("ok", shapes=WORKLOADS[workload].shapes(), **found)


def main() -> None:
    arguments = parse()
    own = settings.from_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    results = Results(environment={}, settings=own.record() | {"at_once": arguments.at_once})
    jobs = [(w, i) for w in arguments.workloads for i in arguments.implementations]
    with tempfile.TemporaryDirectory(prefix="benchmark_caches_") as temporary:
        root = Path(temporary)
        wanted = [job for job in jobs if IMPLEMENTATIONS[job[1]].missing() is None]
        filled = fill(wanted, own, root, arguments.at_once) if arguments.at_once > 1 else {}

        def one(job: Job) -> Run:
            return run(*job, own, arguments.warm, results, folder(root, *job), filled.get(job), root / "turn")

        with ThreadPoolExecutor(2) as pool:  # while one has the device, the next gets ready
            for job, outcome in zip(jobs, pool.map(one, jobs), strict=True):
                console.print(f"{': '.join(job)}: {outcome.status}", highlight=False)
                results.runs.append(outcome)
                results.save(arguments.out)
                shutil.rmtree(folder(root, *job), ignore_errors=True)
    console.print(terminal(results))
    sys.exit(any(r.status == "failed" for r in results.runs))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", required=True, choices=WORKLOADS, metavar="NAME")
    parser.add_argument("--implementations", nargs="+", required=True, choices=IMPLEMENTATIONS, metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--warm", action="store_true", help="also time the first step of another process")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="compile N runs at a time first")
    settings.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
