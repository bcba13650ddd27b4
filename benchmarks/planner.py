"""The planner against the watch: what the cost model predicts for each layer, and what `autotune` measures.

    python -m benchmarks.planner --workloads gpt2 llama-1b --out planner.json

Strategies are timed for each layer by itself. The loss is what a step takes longer, by these times, because the
prediction led to another choice than the measurement would have.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.workloads import WORKLOADS, Workload
from flashdp_compile import autotune
from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.cost import linear_factors
from flashdp_compile.passes.plan import Choice, Plan, make_plan
from flashdp_compile.passes.points import find_points
from flashdp_compile.passes.strategies.linear import is_linear
from flashdp_compile.pipeline import sources_digest
from flashdp_compile.testing import joint_graph

PAGE_STRATEGIES = ("gram", "outer", "store")  # materialising is far behind everywhere
CLIPPINGS = ("per_layer", "flat")
COLUMNS = (
    "workload",
    "clipping",
    "layer",
    "layers",
    "B, T, d, p",
    "us, predicted / measured",
    "taken",
    "faster",
    "loss ms",
)


def points(workload: Workload, device: str) -> list[dict[str, Any]]:
    """One record for each clipping and distinct layer: seconds of each strategy, and the choices that they lead to."""
    one = workload.shallow()
    model, (batch,) = one.model(device=device), one.batches(1, device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        axes = propagate(joint_graph(model, *batch))
    gradients = find_points(axes)
    watch = autotune.timer(sources_digest())
    names = [_first_of_its_kind(name) for name, _ in workload.model(device="meta").named_parameters()]
    found = []
    for clipping in CLIPPINGS:
        predicted = _choices(make_plan(gradients, axes, clipping, 1.0))
        measured = _choices(make_plan(gradients, axes, clipping, 1.0, timed=watch))
        for gradient in (g for g in gradients if is_linear(g, axes)):
            guess, truth = predicted[gradient.name], measured[gradient.name]
            factors = linear_factors(gradient, axes, int)
            found.append(
                {
                    "workload": workload.name,
                    "clipping": clipping,
                    "layer": gradient.name,
                    "layers": names.count(gradient.name),
                    "sizes": [factors.B, factors.T, factors.d, factors.p],
                    "predicted": guess.seconds,
                    "measured": truth.seconds,
                    "taken": guess.strategy.name,
                    "faster": truth.strategy.name,
                }
            )
    return found


def _first_of_its_kind(name: str) -> str:
    """The name that a parameter of the first block has."""
    return re.sub(r"\.\d+\.", ".0.", name)


def _choices(plan: Plan) -> dict[str, Choice]:
    return {c.gradient.name: c for chosen in plan.choices.values() for c in chosen}


def loss(point: dict[str, Any]) -> float:
    """Seconds of a step that the prediction costs, over all layers like this one."""
    seconds = point["measured"]
    return point["layers"] * (seconds[point["taken"]] - seconds[point["faster"]])


def error(found: list[dict[str, Any]]) -> float:
    """The mean absolute relative error of the predictions, each layer's strategies once."""
    pairs = {
        (point["workload"], point["layer"], name): point["predicted"][name] / seconds - 1
        for point in found
        for name, seconds in point["measured"].items()
    }
    return mean(map(abs, pairs.values()))


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table(*COLUMNS, title=f"mean absolute error {100 * error(found):.0f}%")
    for point in found:
        times = (f"{n} {1e6 * point['predicted'][n]:.0f} / {1e6 * s:.0f}" for n, s in point["measured"].items())
        sizes = ", ".join(map(str, point["sizes"]))
        shown.add_row(
            *(point["workload"], point["clipping"], point["layer"], str(point["layers"]), sizes, ", ".join(times)),
            *(point["taken"], point["faster"], f"{1e3 * loss(point):.2f}"),
        )
    return shown


def page_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a page: layers of one workload that differ in nothing but their names share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for point in content["points"]:
        kind = re.sub(r"^blocks\.0\.|\.weight$", "", point["layer"])
        times = (
            f"{1e6 * point['predicted'][name]:.0f} / {1e6 * point['measured'][name]:.0f}" for name in PAGE_STRATEGIES
        )
        sizes = ", ".join(map(str, point["sizes"]))
        row = (point["workload"], sizes, *times, point["taken"], point["faster"])
        names = rows.setdefault(row, [])
        if kind not in names:
            names.append(kind)
    header = ["workload", "layers", "B, T, p, d", *PAGE_STRATEGIES, "taken", "faster"]
    return header, [[row[0], ", ".join(names), *row[1:]] for row, names in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", required=True, choices=WORKLOADS, metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    found = [point for name in arguments.workloads for point in points(WORKLOADS[name], arguments.device)]
    content = {"environment": environment(arguments.device), "error": error(found), "points": found}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    Console(width=170).print(table(found))


if __name__ == "__main__":
    main()
