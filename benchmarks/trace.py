"""From a profiler's trace to milliseconds by category.

A kernel's name need not tell who launched it (an op of flashdp may run several), so a kernel is judged together with
the ops that were running when it was launched. The trace is the one of
torch.profiler.profile(...).export_chrome_trace: kernels carry the "External id" of the op that launched them. Without
a GPU there are no kernels, and an op's own time on the CPU is taken instead.

Communication between ranks runs beside other kernels, which hide most of it: what is hidden and what is not are
categories of their own.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
OPS = ("cpu_op", "user_annotation")


@dataclass(frozen=True)
class Work:
    """Some work: a kernel's name (on a CPU the op's), the ops around its launch from the inside out, microseconds, and
    when it began (on a CPU unknown: an op's own time is not in one piece)."""

    name: str
    ops: tuple[str, ...]
    microseconds: float
    start: float | None = None


# The first that fits decides: (category, pattern of any op around it, pattern of the kernel's name).
_NEVER = r"(?!)"
COMMUNICATION = "communication"
ALONE, HIDDEN = f"{COMMUNICATION}, alone", f"{COMMUNICATION}, beside others"
RULES = (
    (COMMUNICATION, r"^(record_param_comms|(nccl|gloo):)", r"^nccl"),
    ("copies of shards", r"^fsdp::", _NEVER),
    ("optimizer", r"^Optimizer\.step|_fused_adam", _NEVER),
    ("attention", r"attention", r"flash_|fmha|sdpa|attention"),
    ("matmul", r"^aten::(mm|bmm|addmm|baddbmm|linear|matmul)$", r"gemm|cutlass|nvjet|splitKreduce|^triton_tem_"),
    ("convolution", r"convolution", r"conv|cudnn"),
    ("inductor, reductions", _NEVER, r"^triton_(red|per)_"),
    ("inductor, pointwise", _NEVER, r"^triton_"),
    ("copies and fills", r"^aten::(copy_|clone|contiguous|fill_|zero_)$", r"^Mem(cpy|set)"),
)
_COMPILED = [(category, re.compile(ops), re.compile(name, re.IGNORECASE)) for category, ops, name in RULES]


def category(work: Work) -> str:
    """ "flashdp NAME" for a kernel of flashdp or what its op launched, a category of RULES, or "other"."""
    if work.name.startswith("flashdp_"):  # launched by compiled code itself
        return "flashdp " + work.name.removeprefix("flashdp_")
    for op in work.ops:
        if op.startswith("flashdp::"):
            return "flashdp " + op.removeprefix("flashdp::")
    for name, ops, kernel in _COMPILED:
        if kernel.search(work.name) or any(ops.search(op) for op in work.ops):
            return name
    return "other"


def work_of(events: Sequence[dict[str, Any]]) -> list[Work]:
    """All work in the `traceEvents` of a trace: of the device if there is any, else of the CPU."""
    ops = [e for e in events if e.get("ph") == "X" and e.get("cat") in OPS]
    above = _parents(ops)
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in ON_DEVICE]
    if kernels:
        by_id = {e["args"]["External id"]: n for n, e in enumerate(ops) if "External id" in e.get("args", {})}
        launchers = (by_id.get(e.get("args", {}).get("External id")) for e in kernels)
        return [
            Work(e["name"], _path(ops, above, n), e["dur"], e["ts"]) for e, n in zip(kernels, launchers, strict=True)
        ]
    own = [e["dur"] for e in ops]
    for n, parent in enumerate(above):
        if parent is not None:
            own[parent] -= ops[n]["dur"]
    return [Work(e["name"], _path(ops, above, n), own[n]) for n, e in enumerate(ops)]


def _parents(ops: Sequence[dict[str, Any]]) -> list[int | None]:
    """For each op the number of the innermost one of its thread that contains it."""
    threads = defaultdict(list)
    for n, e in enumerate(ops):
        threads[e.get("pid"), e.get("tid")].append(n)
    above: list[int | None] = [None] * len(ops)
    for members in threads.values():
        running: list[int] = []
        for n in sorted(members, key=lambda n: (ops[n]["ts"], -ops[n]["dur"])):
            end = ops[n]["ts"] + ops[n]["dur"]
            while running and ops[running[-1]]["ts"] + ops[running[-1]]["dur"] < end:
                running.pop()
            above[n] = running[-1] if running else None
            running.append(n)
    return above


def _path(ops: Sequence[dict[str, Any]], above: Sequence[int | None], n: int | None) -> tuple[str, ...]:
    names = []
    while n is not None:
        names.append(ops[n]["name"])
        n = above[n]
    return tuple(names)


def busy_ms(work: Iterable[Work], steps: int) -> float:
    """Milliseconds per step in which some of this work was running."""
    work = list(work)
    if any(item.start is None for item in work):
        return sum(item.microseconds for item in work) / 1000 / steps
    total, until = 0.0, -math.inf
    for begin, end in sorted((item.start, item.start + item.microseconds) for item in work):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total / 1000 / steps


def by_category(work: Sequence[Work], steps: int) -> dict[str, float]:
    """{category: milliseconds per step}, largest first."""
    totals: dict[str, float] = defaultdict(float)
    for item in work:
        totals[category(item)] += item.microseconds / 1000 / steps
    if COMMUNICATION in totals and all(item.start is not None for item in work):
        others = [item for item in work if category(item) != COMMUNICATION]
        totals[ALONE] = busy_ms(work, steps) - busy_ms(others, steps)
        totals[HIDDEN] = totals.pop(COMMUNICATION) - totals[ALONE]
    return dict(sorted(totals.items(), key=lambda pair: -pair[1]))


def by_kernel(work: Iterable[Work], steps: int) -> list[dict[str, Any]]:
    """One record for each kernel and category: calls and milliseconds per step, largest first."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item in work:
        entry = totals[item.name, category(item)]
        entry[0] += 1 / steps
        entry[1] += item.microseconds / 1000 / steps
    found = [
        {"name": name, "category": its, "calls": round(calls, 2), "ms": ms}
        for (name, its), (calls, ms) in totals.items()
    ]
    return sorted(found, key=lambda record: -record["ms"])
