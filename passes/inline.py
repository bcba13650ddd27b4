"""Puts the launches of kernels in the place of ops of flashdp, in a graph that Inductor is about to generate.

An op is opaque: Inductor calls it through the dispatcher, and Python prepares every launch anew at every step, which
takes the host longer than the device. Inlined, an op is a fresh buffer, a launch that Inductor writes into its own
code, and ordinary torch code that it fuses with what is around.

It runs behind the proof and behind every pass that simplifies graphs: launches write into their arguments. Ops whose
sizes are known only at run time stay as they are, and so does everything on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import pin_layouts, recorded_launches
from flashdp_compile.kernels import FAMILIES
from flashdp_compile.kernels.clip import release_weights
from flashdp_compile.kernels.family import tensors
from flashdp_compile.passes.take_apart import TakeApart


def inline_kernels(graph: fx.Graph, device: str = "cuda") -> int:
    """Inlines every op on a device of this type that has a kernel for its operands, in place; returns how many."""
    take_apart = TakeApart()
    found = [(n, launch) for n in graph.nodes if (launch := _launch(n, device)) is not None]
    for node, launch in found:
        take_apart(node, launch)
    for recorded in recorded_launches(graph):
        pin_layouts(recorded)
    return len(found)


def _launch(node: fx.Node, device: str) -> Callable[..., Any] | None:
    """What to trace in the place of a node."""
    if getattr(node.target, "namespace", None) != "flashdp":
        return None
    name = node.target._opname  # type: ignore[union-attr]
    family = FAMILIES.get(name)
    values = fx.map_arg(node.args, lambda n: n.meta["val"])
    if not all(t.device.type == device and _is_static(t) for t in tensors(values)):
        return None
    if family is not None:
        return family.launch if family.supports(*values) else None
    # the one call of a release that also counts stays an op: it writes to a counter
    counts = name != "clip_factors" or (node.args[5] if len(node.args) > 5 else True)
    return None if counts else lambda *args: release_weights(*args[:5])


def _is_static(value: torch.Tensor) -> bool:
    return all(isinstance(n, int) for n in (*value.shape, *value.stride(), value.storage_offset()))
