"""Two models trained with and without differential privacy, side by side.

`make demo` takes a few minutes on two CPU cores, and uses a GPU if there is one. `make demo SHORT=1` takes about a
minute: enough to see that it works, not to see it learn much.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console

import data
import report
from gpt import GPT
from training import Run, Task, train
from vit import ViT

LENGTH = 64


def tasks() -> list[Task]:
    """Large batches and few steps: the noise is added once per step, whatever the size of the batch."""
    return [
        Task(
            name="GPT",
            model=lambda: GPT(len(data.ALPHABET), LENGTH),
            data=data.text(LENGTH),
            batch=512,
            steps=150,
            short_steps=12,
            learning_rate=4e-3,
            noise_multiplier=1.0,
        ),
        Task(
            name="ViT",
            model=ViT,
            data=data.digits(),
            batch=512,
            steps=150,
            short_steps=20,
            learning_rate=1e-2,
            noise_multiplier=3.0,
        ),
    ]


def main() -> None:
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    console = Console()
    console.print(f"backend {arguments.backend} on {device}; the first step of each run compiles")
    runs = []
    with report.bars() as bars:
        for task in tasks():
            steps = task.short_steps if arguments.short else task.steps
            for private in (False, True) if arguments.backend == "flashdp" else (False,):
                name = f"{task.name}, {'private' if private else 'non-private'}"
                bar = bars.add_task(name, total=steps, state="compiling")

                def advance(run: Run, bar=bar) -> None:
                    bars.update(bar, completed=len(run.seconds), state=report.state(run))

                runs.append(train(task, private, steps, arguments.backend, device, advance))
                bars.update(bar, state=report.state(runs[-1]))
    console.print(report.table(runs))
    picture = arguments.out / "demo.png"
    report.plot(runs, picture)
    console.print(f"loss and epsilon over the steps: {picture}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps only")
    parser.add_argument("--backend", default="flashdp", help="another one runs the non-private half alone")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
