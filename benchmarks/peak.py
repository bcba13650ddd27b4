"""What a step holds when it holds most: the blocks of memory at the peak, and the lines that asked for them.

    python -m benchmarks.peak --workload llama-3.2-1b-16k --implementations compile flashdp-per_layer

For targets of memory that are missed. Gradients are not checked here.
"""

import argparse
import linecache
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.measure import inputs
from benchmarks.processes import call
from benchmarks.settings import Settings
from benchmarks.steps import run_steps
from benchmarks.workloads import WORKLOADS
from flashdp_compile.compat import allocations

LARGEST = 16  # lines of a table
BELOW = ("/torch/", "/triton/", "<string>")  # of files that allocate on behalf of others
GENERATED = "/torchinductor"


def at_peak(events: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """(bytes, blocks, the line that asked for them) of what was allocated within these events and lives at their peak,
    the largest first."""
    live, held, most = dict[int, Mapping[str, Any]](), 0, 0
    peak: list[Mapping[str, Any]] = []
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            held += event["size"]
        elif event["action"] == "free_completed" and event["addr"] in live:
            held -= live.pop(event["addr"])["size"]
        if held > most:
            most, peak = held, list(live.values())
    bytes_of, blocks = Counter[str](), Counter[str]()
    for event in peak:
        line = _line(event.get("frames", ()))
        bytes_of[line] += event["size"]
        blocks[line] += 1
    return [(size, blocks[line], line) for line, size in bytes_of.most_common()]


def _line(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost line of code that is not a library's: of generated code its text, for its numbers say nothing."""
    for frame in frames:
        name = frame["filename"]
        if GENERATED in name:
            return linecache.getline(name, frame["line"]).strip()[:100] or f"{Path(name).name}:{frame['line']}"
        if not any(part in name for part in BELOW):
            return f"{Path(name).name}:{frame['line']} {frame['name']}"
    return "?"


def measure(workload: str, implementation: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The peak of one step after others, what of it was there before, and what was allocated within."""
    own = Settings(**settings)
    own.limit_memory()
    its, maker = WORKLOADS[workload], IMPLEMENTATIONS[implementation]
    model, batches = inputs(its, maker, own)
    step = maker.make(model, its.batch, own)
    run_steps(step, batches, own.warmup)
    step.optimizer.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with allocations() as events:
        step(batches[0])
    return {"before": before, "peak": torch.cuda.max_memory_allocated(), "blocks": at_peak(events)[:LARGEST]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True, choices=WORKLOADS, metavar="NAME")
    parser.add_argument("--implementations", nargs="+", required=True, choices=IMPLEMENTATIONS, metavar="NAME")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="what a process may use of the device")
    arguments = parser.parse_args()
    console = Console(width=160)
    own = Settings(device="cuda", dtype="bf16", warmup=1, pool=1, memory_gb=arguments.memory_gb)
    for implementation in arguments.implementations:
        given = {"workload": arguments.workload, "implementation": implementation, "settings": own.record()}
        with tempfile.TemporaryDirectory() as caches:
            found = call("benchmarks.peak:measure", given, caches)
        if "failed" in found:
            console.print(f"{implementation}: {found['failed']}")
            continue
        title = (
            f"{implementation}: {found['peak'] / 2**30:.2f} GiB, {found['before'] / 2**30:.2f} of them before the step"
        )
        table = Table("GiB", "blocks", "line", title=title)
        for size, count, line in found["blocks"]:
            table.add_row(f"{size / 2**30:.3f}", str(count), line)
        console.print(table)


if __name__ == "__main__":
    main()
