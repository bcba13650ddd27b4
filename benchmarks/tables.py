"""Tables of results: on the terminal by rich, and in pages as markdown.

A page holds a table between `<!-- table: NAME -->` and `<!-- end -->`; NAME is "targets" or a JSON file of results,
seen from the page. With `<!-- profile: NAME WORKLOAD -->` it is one of where the time of that workload goes, with
`<!-- scaling: NAME -->` of what several ranks gain, with `<!-- planner: NAME -->` and `<!-- kernels: NAME -->` the
results of those modules.
`python -m benchmarks.tables docs/performance.md` writes all of them anew, and with a JSON file it prints that.
"""

import json
import re
import sys
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import kernels, planner, profile, scaling
from benchmarks.implementations import BASELINE
from benchmarks.results import Results, Run
from benchmarks.targets import TARGETS, met, target
from benchmarks.workloads import WORKLOADS

HEADER = (
    "workload",
    "implementation",
    "ms",
    "speed",
    "target",
    "GiB",
    "memory",
    "at most",
    "compile s",
    "warm s",
    "gradient error",
)
NONE = "-"
OTHERS = {"planner": planner, "kernels": kernels}


def rows(results: Results) -> list[list[str]]:
    """One row of texts for each run, in the order of HEADER; speed and memory are ratios to the plain compiled step."""
    return [_row(results, run) for run in results.runs]


def _row(results: Results, run: Run) -> list[str]:
    if run.status != "ok":
        reason = run.reason.replace("|", "/")
        return [run.workload, run.implementation, f"{run.status}: {reason}", *[""] * (len(HEADER) - 3)]
    wanted = target(run)
    return [
        run.workload,
        run.implementation,
        _milliseconds(run),
        _number(results.speed(run), ".3f"),
        _number(wanted and wanted.speed, ".2f"),
        _number(run.peak_bytes and run.peak_bytes / 2**30, ".1f"),
        _number(results.memory(run), ".2f"),
        _number(wanted and wanted.memory, ".2f"),
        _number(run.compile_s, ".0f" if (run.compile_s or 0) >= 10 else ".1f"),
        _number(run.warm_s, ".1f"),
        _number(run.error, ".0e"),
    ]


def _milliseconds(run: Run) -> str:
    """The median, and half of the distance between the 10th and the 90th percentile."""
    if len(run.step_ms) < 2:
        return _number(run.median_ms, ".1f")
    tenths = quantiles(run.step_ms, n=10, method="inclusive")
    return f"{run.median_ms:.1f} ±{(tenths[-1] - tenths[0]) / 2:.1f}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def caption(results: Results) -> str:
    """Device, versions and settings on one line."""
    run = results.settings
    parts = [_made_on(results.environment)]
    if "dtype" in run:
        parts.append(run["dtype"])
    if "steps" in run:
        parts.append(f"{run['steps']} steps after {run['warmup']}")
    if run.get("at_once", 1) > 1:
        parts.append(f"compiled {run['at_once']} at a time")
    return "; ".join(parts)


def _made_on(own: dict[str, Any]) -> str:
    names = ("device", "torch", "cuda", "triton", "flashdp", "opacus", "commit", "date")
    return "; ".join(str(own[n]) if n == "device" else f"{n} {own[n]}" for n in names if own.get(n))


def terminal(results: Results) -> Table:
    """The table that benchmarks.step prints."""
    table = Table(title=caption(results), caption=results.note or None)
    for n, name in enumerate(HEADER):
        table.add_column(name, justify="left" if n < 2 else "right")
    for run, row in zip(results.runs, rows(results), strict=True):
        reached = met(results, run)
        colour = "red" if run.status == "failed" else {True: "green", False: "yellow", None: None}[reached]
        table.add_row(*row, style=colour)
    return table


def markdown(results: Results) -> str:
    """The table of a page, the caption below it."""
    return f"{_pipes(list(HEADER), rows(results))}\n\n{caption(results)}. {results.note}".rstrip()


def targets() -> str:
    """TARGETS as markdown."""
    header = ["workload", "batch, tokens", "per_layer speed", "flat speed", "per_layer memory", "flat memory"]
    lines = []
    for name, by_clipping in TARGETS.items():
        per_layer, flat = by_clipping["flashdp-per_layer"], by_clipping["flashdp-flat"]
        shape = f"{WORKLOADS[name].batch}, {WORKLOADS[name].length}"
        figures = (per_layer.speed, flat.speed, per_layer.memory, flat.memory)
        lines.append([name, shape, *(f"{figure:.2f}" for figure in figures)])
    return _pipes(header, lines)


def fill(page: str, folder: Path) -> str:
    """The text of a page with all of its tables written anew; files are looked up in `folder`."""

    def table(match: re.Match[str]) -> str:
        kind, name, workload = match["kind"], match["name"], match["workload"]
        if kind == "profile":
            text = _pipes(*profile.table_rows(Results.load(folder / name), workload))
        elif kind == "scaling":
            text = _pipes(*scaling.table_rows(Results.load(folder / name)))
        elif kind in OTHERS:
            content = json.loads((folder / name).read_text())
            text = f"{_pipes(*OTHERS[kind].page_rows(content))}\n\n{_made_on(content['environment'])}."
        else:
            text = targets() if name == "targets" else markdown(Results.load(folder / name))
        return f"{match['mark']}\n\n{text}\n\n<!-- end -->"

    mark = r"(?P<mark><!-- (?P<kind>table|profile|scaling|planner|kernels): (?P<name>\S+)( (?P<workload>[^>]+?))? -->)"
    return re.sub(mark + r".*?<!-- end -->", table, page, flags=re.DOTALL)


def _pipes(header: list[str], lines: list[list[str]]) -> str:
    cells: list[Any] = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _profile(results: Results, workload: str) -> Table:
    header, lines = profile.table_rows(results, workload)
    table = Table(title=workload)
    for n, name in enumerate(header):
        table.add_column(name, justify="right" if n else "left")
    categories = [line for line in lines if line[0] not in (profile.STEP, profile.HOST)]
    for line in lines:
        table.add_row(*line, end_section=line is categories[-1])
    return table


def main() -> None:
    for name in sys.argv[1:]:
        if name.endswith(".json"):
            results = Results.load(Path(name))
            profiled = dict.fromkeys(r.workload for r in results.runs if r.categories and r.implementation == BASELINE)
            Console(width=160).print(terminal(results), *(_profile(results, workload) for workload in profiled))
        else:
            page = Path(name)
            page.write_text(fill(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
