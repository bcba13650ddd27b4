"""Who is told what the passes find: the debug flag's folder for every compiled graph, and whoever listens."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from flashdp_compile._version import __version__
from flashdp_compile.compat import versions
from flashdp_compile.passes import dump
from flashdp_compile.pipeline import Record

_numbers = itertools.count()


Listener = Callable[[str, Record], None]
"""(the graph in the user's terms, what the passes found in it)"""

_listeners: list[Listener] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within, `listener` is told of every graph that is compiled. It may raise."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def report(folder: Path | None, label: str) -> Callable[[Record], None] | None:
    """What to call with the record of one graph; None if nobody wants to know."""
    told: list[Callable[[Record], None]] = [functools.partial(listener, label) for listener in _listeners]
    if folder is not None:
        told.insert(0, writer(folder, label))

    def tell(record: Record) -> None:
        for one in told:
            one(record)

    return tell if told else None


def writer(folder: Path, label: str) -> Callable[[Record], None]:
    """What to call with the record of one graph: writes `folder/<process>_<number>/`."""

    def write(record: Record) -> None:
        if record.joint is None and record.error is None:
            return  # a graph without backward
        place = folder / f"{os.getpid()}_{next(_numbers):03d}"
        place.mkdir(parents=True, exist_ok=True)
        head = f"flashdp_compile {__version__}, torch {', triton '.join(versions())}: {label}"
        for name, text in _files(record).items():
            path = place / name
            path.parent.mkdir(exist_ok=True)
            mark = "#" if name.endswith(".py") else ""
            path.write_text(f"{mark} {head}\n\n{text}\n".lstrip(), encoding="utf-8")
        if record.joint is not None and record.axes is not None and record.plan is not None:
            found = dump.as_json(record.joint, record.axes, record.gradients, record.plan, record.options.batch_dim)
            found["options"] = record.options.policy()
            (place / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    return write


def _files(record: Record) -> dict[str, str]:
    files = {"00_joint.py": record.before, "00_inputs.txt": dump.inputs_table(record.inputs, record.options.batch_dim)}
    if record.axes is not None:
        files["01_axes.txt"] = dump.axes_table(record.axes)
    if record.gradients:
        files["02_points.txt"] = dump.points_table(record.gradients)
    if record.plan is not None:
        files["03_plan.txt"] = dump.plan_table(record.plan)
    if record.joint is not None and record.rewritten:
        files["04_rewritten.py"] = dump.graph_text(record.joint.graph)
        for name, text in dump.kernel_sources(record.joint.graph).items():
            files[f"kernels/{name}"] = text
    if record.verified is not None:
        files["05_verified.txt"] = dump.axes_table(record.verified)
    if record.error is not None:
        files["error.txt"] = f"{type(record.error).__name__}: {record.error}"
    return files
