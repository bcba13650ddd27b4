"""Whole training steps: implementations x workloads, one process each.

    python -m benchmarks.step --workloads gpt2 gpt2-padded --implementations compile flashdp-flat --out results.json

Every step's gradients are compared with a reference before it is timed; a step that fails has no times. Results are
saved after every run. The exit status is 1 if one of them failed.

With `--at-once N` the runs compile N at a time and are timed when all of these are ready, one by one: much sooner, but
their compile times are those of a busy machine.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import settings
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.processes import call
from benchmarks.results import Results, Run
from benchmarks.rounds import ALONE, Place
from benchmarks.tables import terminal
from benchmarks.workloads import WORKLOADS


def run(
    workload: str,
    implementation: str,
    own: settings.Settings,
    warm: bool,
    results: Results,
    caches: Path,
    place: Place = ALONE,
) -> Run:
    """One run in a process with these caches, which are empty. `warm` adds another process that finds them filled."""

    def outcome(status: str, **content: Any) -> Run:
        return Run(workload=workload, implementation=implementation, status=status, **content)

    if (reason := IMPLEMENTATIONS[implementation].missing()) is not None:
        place.leave_mark()
        return outcome("skipped", reason=reason)
    arguments = {"workload": workload, "implementation": implementation, "settings": own.record()}
    try:
        found = call("benchmarks.measure:measure", arguments | {"place": asdict(place)}, caches)
    finally:
        place.leave_mark()  # the others wait for it
    if "failed" in found:
        return outcome("failed", reason=found["failed"])
    environment = found.pop("environment")
    if results.environment and results.environment | {"date": environment["date"]} != environment:
        raise RuntimeError(f"device, versions or commit changed between runs: {results.environment}, {environment}")
    results.environment = environment
    if warm:
        with place.alone():
            again = call("benchmarks.measure:first_step", arguments, caches)
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
    pairs = list(product(arguments.workloads, arguments.implementations))
    for i in range(0, len(pairs), arguments.at_once):
        _round(pairs[i : i + arguments.at_once], own, arguments, results, console)
    console.print(terminal(results))
    sys.exit(any(r.status == "failed" for r in results.runs))


def _round(
    pairs: list[tuple[str, str]],
    own: settings.Settings,
    arguments: argparse.Namespace,
    results: Results,
    console: Console,
) -> None:
    """These get ready together; adds a run of each to the results, in this order, and saves them as they come."""
    before = list(results.runs)
    with tempfile.TemporaryDirectory(prefix="benchmark_round_") as folder:

        def one(numbered: tuple[int, tuple[str, str]]) -> Run:
            number, (workload, implementation) = numbered
            name = f"{number}-{implementation}"
            place = Place(folder, name, len(pairs))
            outcome = run(workload, implementation, own, arguments.warm, results, Path(folder) / name, place)
            console.print(f"{workload}: {implementation}: {outcome.status} {outcome.reason}", highlight=False)
            results.runs.append(outcome)
            results.save(arguments.out)
            return outcome

        with ThreadPoolExecutor(len(pairs)) as pool:
            results.runs = before + list(pool.map(one, enumerate(pairs)))
    results.save(arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", required=True, choices=WORKLOADS, metavar="NAME")
    parser.add_argument("--implementations", nargs="+", required=True, choices=IMPLEMENTATIONS, metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--warm", action="store_true", help="also time the first step of another process")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="let N runs compile together")
    settings.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
