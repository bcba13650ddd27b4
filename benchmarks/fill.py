"""Compile caches filled by several processes at a time: most of a benchmark is compilation, and one core does it."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.processes import call
from benchmarks.settings import Settings

Job = tuple[str, str]  # workload, implementation


def folder(root: Path, workload: str, implementation: str) -> Path:
    """Where the caches of one run lie."""
    return root / f"{workload}_{implementation}"


def fill(jobs: Sequence[Job], settings: Settings, root: Path, at_once: int) -> dict[Job, float]:
    """Seconds of the first step of every job that succeeded; its caches are in its `folder`.

    What Inductor tuned by timing kernels is dropped: others used the device at the same time. So kernels are tuned
    again, alone, by whoever uses the caches.
    """

    def first_step(job: Job) -> float | None:
        arguments = {"workload": job[0], "implementation": job[1], "settings": settings.record()}
        return call("benchmarks.measure:first_step", arguments, folder(root, *job)).get("seconds")

    # one implementation after the other, so that large workloads do not meet in the device's memory
    ordered = sorted(jobs, key=lambda job: job[1])
    with ThreadPoolExecutor(at_once) as pool:
        seconds = dict(zip(ordered, pool.map(first_step, ordered), strict=True))
    for job in (job for job, s in seconds.items() if s is None):  # half filled, they would be timed as if empty
        shutil.rmtree(folder(root, *job), ignore_errors=True)
    for tuned in root.rglob("*.best_config"):
        tuned.unlink()
    return {job: s for job, s in seconds.items() if s is not None}
