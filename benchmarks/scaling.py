"""What several ranks gain: throughput of N ranks over N times that of one, each with as many samples of its own.

Results of benchmarks.sharded say in `shapes` how many ranks a run had.
"""

from benchmarks.results import Results, Run

HEADER = ("model", "batch, tokens", "implementation", "ranks", "ms", "scaling", "of the plain step's")


def table_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """A row for each run whose like was measured on one rank too.

    Raises:
        ValueError: there is none.
    """
    lines = [_row(results, run) for run in results.runs if scaling(results, run) is not None]
    if not lines:
        raise ValueError("no workload was measured on one rank and on several")
    return list(HEADER), lines


def scaling(results: Results, run: Run) -> float | None:
    """1 if so many ranks train so many times as many samples in a second; None unless it was measured on one."""
    alone = _like(results, run, ranks=1)
    if run.shapes.get("ranks", 1) == 1 or alone is None or not run.median_ms or not alone.median_ms:
        return None
    return alone.median_ms / run.median_ms


def _like(results: Results, run: Run, **different: int) -> Run | None:
    shapes = {**run.shapes, **different}
    return next((r for r in results.runs if r.implementation == run.implementation and r.shapes == shapes), None)


def _row(results: Results, run: Run) -> list[str]:
    own, base, shapes = scaling(results, run), results.baseline(run), run.shapes
    plain = None if base is None else scaling(results, base)
    return [
        shapes["model"],
        f"{shapes['batch']}, {shapes['length']}",
        run.implementation,
        str(shapes["ranks"]),
        f"{run.median_ms:.1f}",
        f"{own:.3f}",
        "-" if plain is None or not own else f"{own / plain:.3f}",
    ]
