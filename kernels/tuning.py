"""Sizes of tiles, warps and pipeline stages of the matrix families: `tuning.json`, not code.

The file maps an architecture to families to bits per element to a list of entries

    [rows, columns, depth, warps, stages, tiles]

of which the first is taken that cuts one sample's products into at least so many `tiles`: large tiles reuse more, small
ones fill the device. (gram_sqnorm counts along the features that it sums over.) The batch size has no say, so that a
sample's numbers do not depend on the samples beside it. An architecture that is missing takes "default", until somebody
has tried `candidates` on such a device and says what to `learn`. outer_sqnorm and weighted_matmul must agree in
`depth`: what is summed is then what was measured. (`hopper` has no say in it: all add 16 tokens after the other.) The
sizes for sm_90 were the fastest of six on an H100 (docs/measuring.md).
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Tiles(NamedTuple):
    """An output tile of [rows, columns], summed in blocks of `depth`, by `warps` warps with `stages` loads ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiles(family: str, dtype: torch.dtype, device: torch.device, *shapes: tuple[int, int]) -> Tiles:
    """The tiles for a launch that makes products of these shapes [rows, columns], whose operands meet in `dtype`."""
    table = _table()
    entries = table.get(architecture(device), table["default"])[family][str(8 * dtype.itemsize)]
    for *sizes, least in entries:
        chosen = Tiles(*sizes)
        if sum(-(-rows // chosen.rows) * -(-columns // chosen.columns) for rows, columns in shapes) >= least:
            break
    return chosen


def is_known(device: torch.device) -> bool:
    """Whether tiles were chosen for this device."""
    return architecture(device) in _table()


def candidates(family: str, bits: int) -> list[Tiles]:
    """The sizes that some architecture takes for a family, each once."""
    return list(dict.fromkeys(Tiles(*e[:-1]) for table in _table().values() for e in table[family][str(bits)]))


def learn(device: torch.device, found: Mapping[str, Mapping[int, Tiles]]) -> None:
    """Takes these tiles on this device's architecture, by family and bits; "default" for those that are not found."""
    table = _table()
    _learned[architecture(device)] = table[architecture(device)] = {
        family: {
            bits: [[*found[family][int(bits)], 0]] if int(bits) in found.get(family, {}) else entries
            for bits, entries in by_bits.items()
        }
        for family, by_bits in table["default"].items()
    }


@contextlib.contextmanager
def trying(device: torch.device, family: str, bits: int, tiles: Tiles) -> Iterator[None]:
    """Within, a family takes these tiles on this device's architecture, which is not known."""
    learn(device, {family: {bits: tiles}})
    try:
        yield
    finally:
        del _table()[architecture(device)], _learned[architecture(device)]


def learned() -> str:
    """What differs from the file: part of every key under which compiled kernels are kept."""
    return json.dumps(_learned, sort_keys=True)


_learned: dict[str, Any] = {}


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" for an H100; "cpu" where kernels are interpreted."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_tma(device: torch.device) -> bool:
    """Whether tiles can be read through descriptors."""
    name = architecture(device)
    return name.startswith("sm_") and int(name[3:]) >= 90


def for_tokens(tiles: Tiles, tokens: int) -> Tiles:
    """The same tiles, with blocks of half the depth where that many tokens fill them better."""
    half = tiles.depth // 2
    if half < 32 or -(-tokens // half) * half == -(-tokens // tiles.depth) * tiles.depth:
        return tiles
    return tiles._replace(depth=half, stages=tiles.stages + 2)


def room(tiles: Tiles, device: torch.device) -> int:
    """How many programs with such tiles a device runs at a time: 8 warps fill the registers of a multiprocessor."""
    return processors(device) * max(1, 8 // tiles.warps)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("tuning.json").read_text())
