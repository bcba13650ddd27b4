"""What the project wants to reach on one H100, relative to the plain compiled step of the same workload and run."""

from typing import NamedTuple

from benchmarks.results import Results, Run


class Target(NamedTuple):
    """Throughput at least, peak memory at most."""

    speed: float
    memory: float


def _pair(per_layer: float, flat: float) -> dict[str, Target]:
    return {"flashdp-per_layer": Target(per_layer, 1.03), "flashdp-flat": Target(flat, 1.20)}


TARGETS = {
    "gpt2": _pair(1.00, 0.97),
    "gpt2-padded": _pair(0.97, 0.93),
    "gpt2-short": _pair(0.95, 0.92),
    "gpt2-large": _pair(0.97, 0.94),
    "llama-1b": _pair(0.96, 0.93),
    "llama-1b-wide": _pair(0.96, 0.93),
    "llama-1b-long": _pair(0.98, 0.96),
    "vit-b16": _pair(0.95, 0.92),
    **{
        f"llama-3.2-1b-{length}k{tied}{single}": {
            f"flashdp-{clipping}{norms}": Target(0.97, 1.05)
            for clipping in ("per_layer", "flat")
            for norms in ("", "-probes")
        }
        for length in (4, 8, 16, 32)
        for tied in ("", "-tied")
        for single in ("", "-single")
    },
}
COMPILE_TIME, WARM_START = 2.0, 1.2  # at most, times the plain step's


def target(run: Run) -> Target | None:
    return TARGETS.get(run.workload, {}).get(run.implementation)


def met(results: Results, run: Run) -> bool | None:
    """Whether speed and memory reach the target; None where there is none or a figure is missing."""
    wanted, speed, memory = target(run), results.speed(run), results.memory(run)
    return None if wanted is None or speed is None or memory is None else speed >= wanted[0] and memory <= wanted[1]
