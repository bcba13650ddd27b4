"""What torch's graphs say about themselves: sizes, sources, descriptors. Checked on 2.11 and 2.13, all of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import sympy
import torch

# Registers operators that Inductor's decompositions produce (prims.fma), so that the tables of rules find them however
# little of Inductor the process has loaded. 2.11, 2.13.
import torch._inductor.inductor_prims

# make_fx records the aten ops of a function; the python dispatcher lets decompositions see symbolic sizes. 2.11, 2.13.
from torch._dispatch.python import enable_python_dispatcher

# What an input or output of a joint graph stands for. 2.11, 2.13.
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput as GradAOTOutput,
    InputMutationAOTOutput as InputMutationAOTOutput,
    PlainAOTInput as PlainAOTInput,
    TangentAOTInput as TangentAOTInput,
)

# The fake tensor mode of a graph under compilation. 2.11, 2.13.
from torch._guards import detect_fake_mode as detect_fake_mode

# One overload of an operator: what a node of an aten graph calls. 2.11, 2.13.
from torch._ops import OpOverload as OpOverload
from torch.fx.experimental.proxy_tensor import make_fx


def belongs_to_backward(description: Any) -> bool:
    """Whether an input or output of a joint graph is a tangent, a gradient, or a part of one: a tensor subclass is
    taken apart into its tensors, whose descriptions hold that of the whole. So is whatever has no description."""
    if description is None or isinstance(description, (TangentAOTInput, GradAOTOutput)):
        return True
    if not dataclasses.is_dataclass(description):
        return False
    parts = (getattr(description, field.name) for field in dataclasses.fields(description))
    return any(belongs_to_backward(part) for part in parts if dataclasses.is_dataclass(part))


def belongs_to_caller(placeholder: torch.fx.Node) -> bool:
    """Whether whoever calls a compiled graph holds this input until the graph has ended: parameters, buffers, data and
    tangents. What a forward saves for its backward is freed there at its last use. AOTAutograd names them. 2.11, 2.13.
    """
    return str(placeholder.target).startswith(("primals", "tangents", "arg"))


def size_expression(size: int | torch.SymInt) -> int | sympy.Expr:
    """A size as an int, or as the sympy expression of its symbols."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return int(size)


def known_size(size: int | torch.SymInt, value: int) -> bool:
    """Whether torch knows, or has made it a condition of this compilation, that a size is `value`. With
    torch.fx.experimental._config.backed_size_oblivious a symbol can stay where torch has already gone on with a number.
    2.11, 2.13."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size == value))


def settle_size(size: int | torch.SymInt, value: int) -> bool:
    """Whether a size is `value` in this call; if it is a symbol, torch makes that a condition of this compilation.
    An unbacked symbol has no size in this call. 2.11, 2.13."""
    if isinstance(size, torch.SymInt) and size_hint(size, value - 1) != value:
        return False
    return bool(size == value)


def settle_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal in this call; torch makes that a condition of this compilation, and from then on
    has one symbol for both. 2.11, 2.13."""
    if size_hint(a, -1) != size_hint(b, -2):
        return False
    return bool(a == b)


def size_hint(size: int | torch.SymInt, default: int) -> int:
    """The value that a size had when it was traced; `default` for a size without one (an unbacked symbol)."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    try:
        hint = size.node.hint
    except Exception:  # unbacked symbols raise here on some versions, return None on others
        hint = None
    return default if hint is None else int(hint)


def source_name(placeholder: torch.fx.Node) -> str | None:
    """Where dynamo got an input from, as Python text such as L['self']._modules['fc']; None if it does not say."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return name() if callable(name) else name


def live_tensor(placeholder: torch.fx.Node) -> torch.Tensor | None:
    """The tensor that dynamo traced an input from, while it is alive. 2.11, 2.13."""
    example = getattr(placeholder.meta.get("grapharg"), "example", None)
    return example if isinstance(example, torch.Tensor) else None


def is_argument(placeholder: torch.fx.Node) -> bool:
    """Whether an input is an argument of the compiled call (or lies inside one), as opposed to an attribute of a
    module, a global, or a variable of an enclosing function. Both an argument that inner functions use and such a
    variable lie in cells; only the first is an input of the call. 2.11, 2.13."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return False
    guard = source.guard_source() if callable(source.guard_source) else source.guard_source
    root = source
    while getattr(root, "base", None) is not None:
        root = root.base
    from_outside = getattr(root, "is_derefed_cell_contents", False) and not root.is_input
    return guard.name == "LOCAL" and not from_outside


def is_python_float(placeholder: torch.fx.Node) -> bool:
    """Whether an input is a Python float that dynamo passes as a tensor of no dimensions. 2.11, 2.13."""
    return getattr(placeholder.meta.get("grapharg"), "is_tensor", True) is False


def graph_label(gm: torch.fx.GraphModule) -> str:
    """A compiled region in the user's terms: the outermost line of the user's program in its first traced node."""
    for node in gm.graph.nodes:
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
        own = [f for f in frames if "/torch/" not in f[0]]
        if own:
            file, line, function = own[0]
            return f"{function} ({file}:{line})"
    return "a compiled region"


def argument(node: torch.fx.Node, name: str) -> Any:
    """What a node hands to an argument of its op, the default where it was left out. 2.11, 2.13."""
    assert isinstance(node.target, OpOverload)
    declared = node.target._schema.arguments
    place = next(n for n, a in enumerate(declared) if a.name == name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, declared[place].default_value)


def returns_views(op: OpOverload) -> bool:
    """Whether results of an op may share memory with its arguments: so its schema says, or it is `_unsafe_view`.
    2.11, 2.13."""
    return op._opname == "_unsafe_view" or any(r.alias_info is not None for r in op._schema.returns)


def sort_topologically(graph: torch.fx.Graph) -> None:
    """Puts every node behind what it reads, and otherwise leaves the order. 2.11, 2.13."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table by which Inductor decomposes aten ops. 2.11, 2.13."""
    import torch._inductor.lowering  # noqa: F401  some decompositions (max_pool2d) use it without importing it
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def trace(function: Callable[..., Any], arguments: tuple[Any, ...]) -> torch.fx.GraphModule:
    """The aten graph of `function` on fake tensors, decomposed as Inductor decomposes.

    Tracing knows a tensor by its identity, and nodes of a graph may share one: every argument gets one of its own.
    """
    own = tuple(torch.ops.aten.alias(a) if isinstance(a, torch.Tensor) else a for a in arguments)
    with enable_python_dispatcher():
        return make_fx(function, decomposition_table=decompositions(), tracing_mode="real")(*own)
