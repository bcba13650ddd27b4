"""What the demo shows: bars while it trains, a table and a picture when it is done."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file; no display needed
import matplotlib.pyplot as plt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from training import DELTA, Run


def bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )


def state(run: Run) -> str:
    text = f"loss {run.losses[-1]:.2f}"
    return text + (f"  epsilon {run.epsilons[-1]:.2f}" if run.private else "")


def label(run: Run) -> str:
    return "private" if run.private else "non-private"


def table(runs: Sequence[Run]) -> Table:
    """One row for each run; the runs of one task stand next to each other, the non-private one first."""
    shown = Table(title=f"on held-out data, before and after training; delta {DELTA:g}")
    for name in ("model", "training", "loss", "accuracy", "epsilon", "ms/step", "speed"):
        shown.add_column(name, justify="left" if name in ("model", "training") else "right")
    plain = {run.task.name: run.ms_per_step for run in runs if not run.private}
    for run in runs:
        shown.add_row(
            run.task.name,
            label(run),
            f"{run.losses[0]:.2f} to {run.losses[-1]:.2f}",
            f"{run.accuracies[0]:.0%} to {run.accuracies[-1]:.0%}",
            f"{run.epsilons[-1]:.2f}" if run.private else "none",
            f"{run.ms_per_step:.0f}",
            f"{plain[run.task.name] / run.ms_per_step:.2f}",
            end_section=run.private,
        )
    return shown


def plot(runs: Sequence[Run], file: Path) -> None:
    """Loss on the left, epsilon on the right, one row of axes for each task."""
    names = list(dict.fromkeys(run.task.name for run in runs))
    figure, rows = plt.subplots(len(names), 2, figsize=(10, 3.6 * len(names)), squeeze=False, layout="constrained")
    for name, (losses, epsilons) in zip(names, rows, strict=True):
        for run in (run for run in runs if run.task.name == name):
            color = "tab:blue" if run.private else "tab:gray"
            losses.plot(run.steps, run.losses, color=color, label=label(run))
            if run.private:
                sigma, rate = run.task.noise_multiplier, run.task.rate
                text = f"noise multiplier {sigma:g}, sampling rate {rate:.3f}, delta {DELTA:g}"
                epsilons.plot(run.steps, run.epsilons, color=color, label=text)
        losses.set(title=f"{name}: loss on held-out data", xlabel="step", ylim=(0, None))
        epsilons.set(title=f"{name}: privacy spent", xlabel="step", ylabel="epsilon", ylim=(0, None))
        for axes in (losses, epsilons):
            axes.grid(alpha=0.3)
            axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
