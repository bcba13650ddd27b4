"""Refusals: the op, the user's line, the parameters that it affects, and what to do instead."""

from __future__ import annotations

import re
from typing import NoReturn

from torch import fx

from flashdp_compile.errors import Refusal
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.order import dependents

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)(?:\n\s+(?P<code>.+))?')


def user_line(node: fx.Node) -> str:
    """The innermost line of the user's program that made a node, as `file:line, in function: code`.

    Nodes made by decompositions often carry no trace; then the nearest value that feeds them speaks for them.
    """
    queue, seen = [node], set()
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        frames = list(_FRAME.finditer(current.meta.get("stack_trace") or ""))
        if frames:
            own = [f for f in frames if "/torch/" not in f["file"]] or frames
            frame = own[-1]
            code = f": {frame['code'].strip()}" if frame["code"] else ""
            return f"{frame['file']}:{frame['line']}, in {frame['function']}{code}"
        queue.extend(current.all_input_nodes)
    return "unknown (torch recorded no source line for this value)"


def affected(node: fx.Node, joint: JointGraph) -> str:
    """The parameters whose gradients depend on a node."""
    reached = {node, *dependents([node])}
    names = [g.name for g in joint.gradients if g.node in reached]
    if not names:
        return "all parameters, through the outputs that it flows into"
    return "the gradients of " + ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def refuse(node: fx.Node, joint: JointGraph, reason: str, fix: str) -> NoReturn:
    """Raise the `Refusal` of a graph at one of its nodes."""
    raise Refusal(
        "flashdp cannot prove that samples are independent\n"
        f"  where    {user_line(node)}\n"
        f"  what     {node.target}: {reason}\n"
        f"  affects  {affected(node, joint)}\n"
        "  why      clipping one sample's gradient would not bound what that sample changes\n"
        f"  to do    {fix or 'rewrite this step so that every sample is treated alone'}"
    )
