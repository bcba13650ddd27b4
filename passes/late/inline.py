"""Puts the launches of kernels in the place of ops of flashdp, in a graph that Inductor is about to generate.

An op is opaque: Inductor calls it through the dispatcher, and Python prepares every launch anew at every step, which
takes the host longer than the device. Inlined, an op is a fresh buffer, a launch that Inductor writes into its own
code, and ordinary torch code that it fuses with what is around.

It runs behind the proof and behind every pass that simplifies graphs: launches write into their arguments. Ops whose
sizes are known only at run time stay as they are, those whose kernel is written in Gluon, and all ops on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import argument, pin_layouts, recorded_launches, written_by
from flashdp_compile.errors import InternalError
from flashdp_compile.kernels import FAMILIES
from flashdp_compile.kernels.clip import release_weights
from flashdp_compile.kernels.family import Family, tensors
from flashdp_compile.passes.apart.take_apart import TakeApart
from flashdp_compile.passes.nodes import RESHAPES, is_static

aten = torch.ops.aten


def inline_kernels(graph: fx.Graph, device: str = "cuda") -> int:
    """Inlines every op on a device of this type that has a kernel for its operands, in place; returns how many."""
    take_apart = TakeApart()
    found = [(n, launch) for n in graph.nodes if (launch := _launch(n, device)) is not None]
    for node, launch in found:
        take_apart(node, launch)
    _sort_once(graph)
    launches = recorded_launches(graph)
    for node in launches:
        pin_layouts(node)
    for node, family in [(n, family) for n in graph.nodes if (family := _stays(n, device)) is not None]:
        pin_layouts(node)
        family.compile_early(*_operands(node, device))
    _check_writes(launches)
    return len(found)


def _sort_once(graph: fx.Graph) -> None:
    """Norm and sum of an embedding sort the same ids. Inductor merges no equal values this late.

    Equal are views of one node; of two nodes that read the same, each may be a random draw.
    """
    first: dict[str, fx.Node] = {}
    for sort in graph.find_nodes(op="call_function", target=aten.sort.stable):
        flat = sort.args[0]
        if flat.target not in RESHAPES:
            continue
        same = first.setdefault(repr((flat.target, flat.args, flat.kwargs, sort.args[1:], sort.kwargs)), sort)
        if same is not sort:
            sort.replace_all_uses_with(same)
            graph.erase_node(sort)


def _check_writes(launches: list[fx.Node]) -> None:
    """Raises InternalError unless Inductor sees that every fresh buffer is written by the first launch that has it.

    It would else be free to read the buffer before the launch, or to leave the launch out: noise and clipped sums would
    then be whatever the memory held before.
    """
    judged, written = set(), set[fx.Node]()
    for launch in launches:
        arguments = launch.kwargs["kwargs"]
        assert isinstance(arguments, dict)
        buffers = {n: a for n, a in arguments.items() if isinstance(a, fx.Node) and _is_fresh(a) and a not in written}
        written.update(buffers.values())
        fresh = set(buffers)
        if (kind := (launch.kwargs["kernel_idx"], *sorted(fresh))) in judged:
            continue
        judged.add(kind)
        if unseen := fresh - written_by(launch):
            raise InternalError(f"Inductor does not see that a kernel of flashdp writes {sorted(unseen)}")


def _is_fresh(node: fx.Node) -> bool:
    """Whether a value is memory and nothing more: empty, or all zero. Weights of one are values to be read."""
    if node.op != "call_function" or node.all_input_nodes:
        return False
    if node.target is aten.ones.default:
        return False
    return node.target is not aten.full.default or argument(node, "fill_value") == 0


def _launch(node: fx.Node, device: str) -> Callable[..., Any] | None:
    """What to trace in the place of a node."""
    if (values := _operands(node, device)) is None:
        return None
    name = node.target._opname  # type: ignore[union-attr]
    if (family := FAMILIES.get(name)) is not None:
        return family.launch if family.supports(*values) and not family.stays_op(*values) else None
    # the one call of a release that also counts stays an op: it writes to a counter
    if name != "clip_factors" or argument(node, "counts"):
        return None
    return lambda sqnorm, bound, fn, mean, size, counts, others=None, grad_scale=None: release_weights(
        sqnorm, bound, fn, mean, size, grad_scale
    )


def _stays(node: fx.Node, device: str) -> Family | None:
    """The family of an op that takes a kernel which Inductor cannot write."""
    values = _operands(node, device)
    family = None if values is None else FAMILIES.get(node.target._opname)  # type: ignore[union-attr]
    return family if family is not None and family.supports(*values) and family.stays_op(*values) else None


def _operands(node: fx.Node, device: str) -> Any:
    """The values of an op of ours on a device of this type, whose sizes are known; else None."""
    if getattr(node.target, "namespace", None) != "flashdp":
        return None
    values = fx.map_arg(node.args, lambda n: n.meta["val"])
    return values if all(t.device.type == device and is_static(t) for t in tensors(values)) else None
