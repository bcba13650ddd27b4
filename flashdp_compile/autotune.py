"""`autotune=True`: how long each strategy takes, measured on the device at hand instead of predicted.

What is timed are both halves of a strategy on random factors of a gradient's sizes, replayed by a CUDA graph so that
the host has no say; a layer by itself, where the step may launch several together. Times are kept in a file for each
question beside Inductor's caches: device, versions, sources of the kernels, strategy, sizes and dtype.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flashdp_compile.compat import cache_folder, padded_row, real_tensors, versions
from flashdp_compile.kernels import FAMILIES, tuning
from flashdp_compile.passes.cost import Factors
from flashdp_compile.passes.strategies.base import Strategy

SECONDS = 0.05  # how long a strategy is measured on a CPU; on a GPU, milliseconds of replays
REPLAYS_MS = 20


def timer(digest: str) -> Callable[[Strategy, Factors], float | None]:
    """Seconds of a strategy on factors: from the file, or measured now. None for a strategy that cannot be tried.

    `digest` identifies the sources of the kernels. A strategy that runs out of memory takes forever.
    """

    def seconds(strategy: Strategy, factors: Factors) -> float | None:
        if strategy.trial is None:
            return None
        question = _question(strategy, factors, digest)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return float((kept(question) or {})["seconds"])
        found = _measured(strategy.trial, factors)
        keep(question, {"strategy": strategy.name, "seconds": found})
        return found

    return seconds


def _question(strategy: Strategy, factors: Factors, digest: str) -> list[Any]:
    device = torch.cuda.get_device_name(factors.device) if factors.device.type == "cuda" else factors.device.type
    sizes = {name: str(value) for name, value in asdict(factors).items() if name != "device"}
    tiles = [str(tuning.tiles(f.name, factors.dtype, factors.device, (2**30, 1))) for f in FAMILIES.values() if f.tiled]
    return [strategy.name, device, sizes, versions(), digest, tiles]


def _path(question: list[Any]) -> Path:
    key = json.dumps(question, sort_keys=True)
    return cache_folder() / "flashdp_autotune" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def kept(question: list[Any]) -> dict[str, Any] | None:
    """What was kept for a question, if it can be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(_path(question).read_text())
        return content if isinstance(content, dict) else None
    return None


def keep(question: list[Any], content: dict[str, Any]) -> None:
    """Beside and renamed, so that no process can read half of it. A folder that cannot be written keeps nothing."""
    path = _path(question)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(content, file)
        os.replace(draft, path)


def _measured(trial: Callable[..., Any], factors: Factors) -> float:
    with real_tensors(), torch.no_grad(), torch.autocast(factors.device.type, enabled=False):
        generator = torch.Generator(factors.device).manual_seed(0)  # the state of other generators is the user's

        def normal(width: int) -> torch.Tensor:
            """[B, T, width], with the strides that Inductor gives to what it makes."""
            shape = factors.B, factors.T, padded_row(width, factors.dtype)
            return torch.randn(shape, dtype=factors.dtype, device=factors.device, generator=generator)[..., :width]

        try:
            operands = normal(factors.d), normal(factors.p)
            weights = torch.ones(factors.B, device=factors.device)
            return median_seconds(lambda: trial(*operands, weights), factors.device)
        except torch.OutOfMemoryError:
            return float("inf")


def median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of many calls, on a GPU replayed by a CUDA graph."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        with torch.cuda.device(device):
            return 1e-3 * do_bench_cudagraph(call, rep=REPLAYS_MS, return_mode="median")
    from torch.utils.benchmark import Timer

    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=SECONDS).median
