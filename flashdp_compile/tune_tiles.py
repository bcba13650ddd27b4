"""Tiles for a device that `kernels/tuning.json` does not know: timed once for each architecture, under `autotune=True`.

Every size that suits some other architecture is tried on a product of medium size, after a comparison with the twin;
what does not compile there, does not fit or is wrong is not taken. The fastest are kept in a file beside Inductor's
caches, for each device, versions and sources of the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.autotune import keep, kept, median_seconds
from flashdp_compile.compat import real_tensors, versions
from flashdp_compile.kernels import FAMILIES, tuning
from flashdp_compile.kernels.tuning import Tiles

SIZES = {16: (8, 512, 1024, 1024), 32: (4, 256, 512, 512)}  # B, T, d, p of the trials, by bits
DTYPES = {16: torch.bfloat16, 32: torch.float32}
WRONG = 2e-2  # relative: squares that are bounded from above, in 16 bits
Found = dict[str, dict[int, Tiles]]


def tune_tiles(device: torch.device, digest: str) -> None:
    """Tiles for this device, from the file or measured now. Nothing for a CPU and for a device that is known.

    `digest` identifies the sources of the kernels.
    """
    if device.type != "cuda" or tuning.is_known(device):
        return
    question = ["tiles", torch.cuda.get_device_name(device), versions(), digest]
    content = kept(question)
    if content is None:
        content = {"tiles": _measured(device)}
        keep(question, content)
    found = {f: {int(bits): Tiles(*sizes) for bits, sizes in t.items()} for f, t in content["tiles"].items()}
    tuning.learn(device, found)


def _measured(device: torch.device) -> Found:
    found: Found = {}
    with real_tensors(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for bits in SIZES:
            trials = _trials(bits, device)
            seconds = {
                family: {
                    tiles: _seconds(trial, device, family, bits, tiles) for tiles in tuning.candidates(family, bits)
                }
                for family, trial in trials.items()
            }
            for family, tiles in _fastest(seconds).items():
                found.setdefault(family, {})[bits] = tiles
    return found


def _fastest(seconds: dict[str, dict[Tiles, float]]) -> dict[str, Tiles]:
    """The fastest tiles of each family that has some; outer_sqnorm and weighted_matmul in blocks of one depth."""
    alike = ("outer_sqnorm", "weighted_matmul")
    best = {family: min(times, key=times.__getitem__) for family, times in seconds.items() if family not in alike}
    norms, sums = (seconds[family] for family in alike)
    pairs = [(norms[a] + sums[b], (a, b)) for a in norms for b in sums if a.depth == b.depth]
    best.update(zip(alike, min(pairs)[1], strict=True))
    timed = {family: seconds[family][tiles] for family, tiles in best.items()}
    return {family: tiles for family, tiles in best.items() if timed[family] < float("inf")}


def _trials(bits: int, device: torch.device) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """By what `tuning.json` calls it: a family, and arguments for it."""
    B, T, d, p = SIZES[bits]
    generator = torch.Generator(device).manual_seed(0)

    def normal(width: int) -> Tensor:
        return torch.randn((B, T, width), dtype=DTYPES[bits], device=device, generator=generator)

    x, g, odd = normal(d), normal(p), normal(p + 1)
    return {
        "outer_sqnorm": ("outer_sqnorm", (x, g)),
        "weighted_matmul": ("weighted_matmul", (x, g, torch.ones(B, device=device))),
        "outer_store": ("outer_store", (x, g)),
        "outer_store by pointers": ("outer_store", (x, odd)),
        "gram_sqnorm": ("gram_sqnorm", (x, [g], [False])),
    }


def _seconds(trial: tuple[str, tuple[Any, ...]], device: torch.device, name: str, bits: int, tiles: Tiles) -> float:
    """Infinity for tiles that this device cannot run, and for wrong values."""
    family, arguments = FAMILIES[trial[0]], trial[1]
    call: Callable[[], Any] = lambda: family.launch(*arguments)  # noqa: E731
    with tuning.trying(device, name, bits, tiles):
        with contextlib.suppress(Exception):  # of the compiler and of the driver: there is no list of them
            if _right(call(), family.reference(*arguments)):
                return median_seconds(call, device)
    return float("inf")


def _right(values: Any, expected: Any) -> bool:
    pairs = zip(values, expected, strict=True) if isinstance(values, tuple) else [(values, expected)]
    return all(bool((a - e).float().norm() <= WRONG * e.float().norm()) for a, e in pairs)
