"""Results of one run of benchmarks.step: a JSON file, and the ratios that are read off it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.implementations import BASELINE

FORMAT = 1
REPLICAS = "ddp-"  # of implementations by DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class Run:
    """One implementation on one workload. `status` is "ok", "failed" or "skipped"; only "ok" has figures.

    step_ms     of every timed step; empty where only the median was kept
    host_ms     until the host has launched a step, from an idle device; None on a CPU
    peak_bytes  of allocated device memory during the timed steps; None on a CPU
    compile_s   the first forward and backward, caches empty; warm_s the same in another process with the caches left
    warm        what torch counted and timed in the warm start: hits of its caches, seconds by phase
    error       of the gradients against the reference, see check.py; worst is the parameter that has it
    categories  milliseconds of a step by kind of work; kernels are the largest one by one: see profile.py
    """

    workload: str
    implementation: str
    status: str
    reason: str = ""
    shapes: dict[str, Any] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    host_ms: float | None = None
    peak_bytes: int | None = None
    compile_s: float | None = None
    warm_s: float | None = None
    warm: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    worst: str = ""
    categories: dict[str, float] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)


@dataclass(kw_only=True)
class Results:
    """Runs on one device with one set of versions: only these may be compared."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    note: str = ""

    def baseline(self, run: Run) -> Run | None:
        """The plain compiled step of the same workload, if it succeeded; that of replicas for replicas."""
        name = REPLICAS + BASELINE if run.implementation.startswith(REPLICAS) else BASELINE
        found = (r for r in self.runs if r.workload == run.workload and r.implementation == name)
        return next((r for r in found if r.status == "ok"), None)

    def speed(self, run: Run) -> float | None:
        """Throughput relative to the baseline."""
        base = self.baseline(run)
        return None if base is None or not run.median_ms or not base.median_ms else base.median_ms / run.median_ms

    def memory(self, run: Run) -> float | None:
        """Peak memory relative to the baseline."""
        base = self.baseline(run)
        return None if base is None or not run.peak_bytes or not base.peak_bytes else run.peak_bytes / base.peak_bytes

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        content = json.loads(path.read_text())
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a result of benchmarks.step in format {FORMAT}")
        return cls(**{**content, "runs": [Run(**run) for run in content["runs"]]})
