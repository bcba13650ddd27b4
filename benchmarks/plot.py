"""Bars of throughput relative to the plain compiled step: python -m benchmarks.plot results.json picture.svg

Of several files, each workload is compared within its own.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmarks.implementations import BASELINE, IMPLEMENTATIONS
from benchmarks.results import Results
from benchmarks.tables import caption
from benchmarks.targets import target

INK, GRID, CARD = "#1f2933", "#cbd2d9", "#ffffff"
COLOURS = {
    "eager": "#9aa5b1",
    "compile": "#52606d",
    "flashdp-flat": "#e8833a",
    "flashdp-per_layer": "#2f6fb3",
    "flashdp-flat-triton": "#f2b27a",
    "flashdp-per_layer-triton": "#7fb0df",
    "compile-graphs": "#7f8c99",
    "flashdp-flat-graphs": "#c9632b",
    "flashdp-per_layer-graphs": "#1f4f80",
    "flashdp-flat-probes": "#e86a8f",
    "flashdp-per_layer-probes": "#6a7fd9",
    "engine-flat": "#d9a441",
    "engine-flat-philox": "#e9cf8f",
    "engine-flat-quantile": "#b98a2e",
    "engine-per_layer-quantile": "#4a9a9a",
    "opacus-hooks": "#7a9e3d",
    "opacus-ghost": "#a8659b",
}
assert list(COLOURS) == list(IMPLEMENTATIONS), "a colour for each implementation"


def draw(results: Results, picture: Path) -> None:
    """A group of bars for each workload, one for each implementation but the baseline; a line is the target."""
    runs = [run for run in results.runs if run.implementation != BASELINE and results.speed(run) is not None]
    workloads = list(dict.fromkeys(run.workload for run in runs))
    shown = [name for name in IMPLEMENTATIONS if any(run.implementation == name for run in runs)]
    width = 0.8 / max(1, len(shown))
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "flashdp_compile", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(max(5.0, 1.5 + 1.3 * len(workloads)), 3.6), layout="constrained")
    figure.patch.set_facecolor(CARD)  # opaque: the picture reads the same on light and dark pages
    for run in runs:
        speed, wanted, which = results.speed(run) or 0.0, target(run), shown.index(run.implementation)
        left = workloads.index(run.workload) - 0.4 + which * width
        axes.bar(left, speed, width * 0.92, align="edge", color=COLOURS[run.implementation])
        axes.annotate(f"{speed:.2f}", (left + 0.46 * width, speed), ha="center", va="bottom", fontsize=8, color=INK)
        if wanted is not None:
            axes.hlines(wanted.speed, left, left + width * 0.92, color=INK, linewidth=1.5)
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylim(0, max([1.12, *(1.1 * (results.speed(run) or 0) for run in runs)]))
    axes.set_xlim(-0.6, max(1, len(workloads)) - 0.4)
    axes.set_ylabel("throughput, torch.compile = 1", color=INK)
    axes.set_title(caption(results).split("; ")[0], fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    handles = [Patch(color=COLOURS[name], label=name) for name in shown]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    plt.close(figure)
    if picture.suffix == ".svg":
        picture.write_text("\n".join(line.rstrip() for line in picture.read_text().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    first, *more = map(Results.load, arguments.results)
    for results in more:
        first.runs += [run for run in results.runs if run.workload not in {r.workload for r in first.runs}]
    draw(first, arguments.picture)


if __name__ == "__main__":
    main()
