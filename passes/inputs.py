"""The inputs of a compiled region by the names that its user knows, and what each holds, read off dynamo's graph."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from flashdp_compile.compat import is_argument, is_python_float, size_expression, source_name

Role = Literal["parameter", "buffer", "public", "sample", "size", "unknown"]


@dataclass(frozen=True)
class Input:
    """One input of the compiled region, by the name that its user knows it by."""

    name: str
    role: Role
    shape: tuple[str, ...] = ()
    dtype: str = ""


_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.?([A-Za-z_]\w*)")


def friendly_name(source: str, with_root: bool = False) -> str:
    """`L['self']._modules['fc']._parameters['weight']` -> `fc.weight`, `L['x']` -> `x`, `L['b']['ids']` -> `b.ids`.

    `with_root` keeps the variable that holds the module: `L['encoder']._parameters['weight']` -> `encoder.weight`.
    """
    parts = [next(g for g in m.groups() if g is not None) for m in _PART.finditer(source)]
    if len(parts) > 2 and parts[1] == "kwargs":
        parts = parts[:1] + parts[2:]  # dynamo's frame packs keyword arguments; their user calls them by name
    rooted_in_module = "._modules[" in source or "._parameters[" in source or "._buffers[" in source
    parts = parts[1:] if parts and parts[0] in ("L", "G") else parts
    parts = parts[1:] if rooted_in_module and len(parts) > 1 and not with_root else parts
    return ".".join(p for p in parts if p not in ("_modules", "_parameters", "_buffers")) or source


def describe_inputs(graph: fx.Graph, public_inputs: Sequence[str]) -> tuple[Input, ...]:
    """The inputs of dynamo's graph in order.

    A tensor is a parameter, a buffer, declared public, or, as an argument of the compiled call, samples. Any other (an
    attribute of a module, a global, a variable of an enclosing function) could hold anything, earlier samples too: its
    role is unknown, and `capture` asks for it to be declared.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = _names([source_name(n) or n.name for n in placeholders])
    return tuple(_describe(n, name, public_inputs) for n, name in zip(placeholders, names, strict=True))


def _names(sources: Sequence[str]) -> list[str]:
    """A name for each source, no two the same. A function of several modules (`lambda x: head(encoder(x))`) has several
    parameters called `weight`: then the variables that hold the modules are part of the names."""
    names = [friendly_name(s) for s in sources]
    of_several = {_root(s) for s, n in zip(sources, names, strict=True) if names.count(n) > 1}
    names = [friendly_name(s, _root(s) in of_several) for s in sources]
    return [s if names.count(n) > 1 else n for s, n in zip(sources, names, strict=True)]


def _root(source: str) -> str:
    return re.split(r"\._(?:modules|parameters|buffers)\[", source, maxsplit=1)[0]


def _describe(node: fx.Node, name: str, public_inputs: Sequence[str]) -> Input:
    value = node.meta.get("example_value")
    source = source_name(node)
    if not isinstance(value, torch.Tensor):
        return Input(name, "size")
    role: Role = "sample" if is_argument(node) else "unknown"
    if isinstance(value, torch.nn.Parameter):
        role = "parameter"
    elif source and re.search(r"\._buffers\['[^']+'\]$", source):
        role = "buffer"
    elif is_python_float(node) or any(fnmatch.fnmatchcase(name, p) for p in public_inputs):
        role = "public"
    shape = tuple(str(size_expression(s)) for s in value.shape)
    return Input(name, role, shape, str(value.dtype).removeprefix("torch."))
