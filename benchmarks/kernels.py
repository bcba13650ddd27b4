"""Single kernels against their floors: python -m benchmarks.kernels --out kernels.json --shapes qkv fc

Values are compared with the family's twin in float64 before a kernel is timed; wrong ones have no time, and the exit
status is then 1. Share is floor over time: 1 or more reaches the floor, which kernel_cases.py defines.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.kernel_cases import SHAPES, KernelCase, cases
from flashdp_compile.kernels import FAMILIES

# Relative, in the Frobenius norm. Squared norms by pairs may be raised by their guard, up to 1.3e-2 at T = 4096;
# outer_store's product is rounded to bfloat16.
TOLERANCES = {"gram_sqnorm": 2e-2, "embedding_sqnorm": 2e-2, "outer_store": 5e-3}
TOLERANCE = 1e-3
COLUMNS = ("family", "shape", "B, T, d, p", "ms", "floor ms", "share", "error")


def value_error(case: KernelCase) -> float:
    """The largest relative error of any result of the op, against the twin in float64; NaN where one is not finite."""
    family = FAMILIES[case.family]
    found, expected = family.op(*case.arguments), family.reference(*_widened(case.arguments))
    errors = []
    for a, e in zip(_results(found), _results(expected), strict=True):
        errors.append(float(torch.linalg.vector_norm(a.double() - e) / torch.linalg.vector_norm(e)))
    return max(errors) if all(map(isfinite, errors)) else float("nan")


def _results(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _widened(arguments: tuple) -> tuple:
    """Floating-point operands of 16 bits in float64; lists likewise."""

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(entry) for entry in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(wide, arguments))


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """The median of many calls. On a GPU they are replayed by a CUDA graph, so that the host has no say, and the L2
    cache is cleared before each."""
    if device == "cuda":
        from triton.testing import do_bench_cudagraph  # late: a machine without a GPU may have no Triton

        cache = torch.empty(2**28, dtype=torch.int8, device=device)

        def cold() -> None:
            cache.zero_()
            call()

        alone, both = (do_bench_cudagraph(f, rep=50, return_mode="median") for f in (cache.zero_, cold))
        return both - alone
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / (milliseconds(lambda: target.copy_(source), device) / 1000)


def measure(case: KernelCase, bandwidth: float, device: str) -> dict[str, Any]:
    """The record of one case."""
    record: dict[str, Any] = {"family": case.family, "shape": case.shape, "error": value_error(case)}
    if not record["error"] <= TOLERANCES.get(case.family, TOLERANCE):
        return record | {"failed": "values differ from the twin's"}
    op = FAMILIES[case.family].op
    ms = milliseconds(lambda: op(*case.arguments), device)
    best = 1000 * case.roofline_s(bandwidth) if case.baseline is None else milliseconds(case.baseline, device)
    floor = case.allowance * best
    return record | {"ms": ms, "floor_ms": floor, "share": floor / ms}


def table(content: dict[str, Any]) -> Table:
    """What is printed of a JSON file's content."""
    own, shown = content["environment"], Table(*COLUMNS)
    shown.title = f"{own['device']}; torch {own['torch']}; triton {own['triton']}; commit {own['commit']}"
    shown.caption = f"a copy moves {content['copy_bandwidth'] / 1e12:.2f} TB/s"
    for row in content["kernels"]:
        shape = SHAPES[row["shape"]]
        sizes = f"{shape.B}, {shape.T}, {shape.d}, {shape.p}"
        figures = (
            [row["failed"], "", ""]
            if "failed" in row
            else [f"{row['ms']:.3f}", f"{row['floor_ms']:.3f}", f"{row['share']:.2f}"]
        )
        shown.add_row(row["family"], row["shape"], sizes, *figures, f"{row['error']:.0e}")
    return shown


def page_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a page: the share of its floor that each family reaches, by shape; a dash was not timed."""
    shapes = list(dict.fromkeys(row["shape"] for row in content["kernels"]))
    shares: dict[str, dict[str, str]] = {}
    for row in content["kernels"]:
        text = "failed" if "failed" in row else f"{row['share']:.2f} ({1000 * row['ms']:.0f} us)"
        shares.setdefault(row["family"], {})[row["shape"]] = text
    sizes = [f"{n}: {SHAPES[n].B}, {SHAPES[n].T}, {SHAPES[n].d}, {SHAPES[n].p}" for n in shapes]
    return ["kernel", *sizes], [[family, *(found.get(n, "-") for n in shapes)] for family, found in shares.items()]


def main() -> None:
    arguments = parse()
    device = arguments.device
    content: dict[str, Any] = {
        "environment": environment(device),
        "copy_bandwidth": copy_bandwidth(device),
        "kernels": [],
    }
    for name in arguments.shapes:
        for case in cases(SHAPES[name], device):
            if case.family in arguments.families:
                content["kernels"].append(measure(case, content["copy_bandwidth"], device))
                arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 140).print(table(content))
    sys.exit(any("failed" in row for row in content["kernels"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=real, metavar="NAME")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
