"""Puts formulas in the place of fused ops that add something up over samples inside, before any pass looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from flashdp_compile.compat import OpOverload
from flashdp_compile.passes.apart import distances, fused_cells
from flashdp_compile.passes.apart.take_apart import TakeApart

FORMULAS: dict[OpOverload, Callable[..., Any]] = {**fused_cells.FORMULAS, **distances.FORMULAS}


def take_fused_apart(graph: fx.Graph) -> int:
    """Replaces every fused op by its formula, in place; returns how many."""
    fused = [n for n in graph.nodes if n.op == "call_function" and n.target in FORMULAS]
    take_apart = TakeApart()
    for node in fused:
        take_apart(node, FORMULAS[node.target])
    return len(fused)
