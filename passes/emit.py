"""Writes ordinary torch code into a joint graph: a function is traced to decomposed aten ops and inlined.

Every node that the rewrite adds comes from here, so it has fake values, is made of ops that Inductor lowers, and
stands as early in the graph as its operands allow, so that per-layer clipping finishes each layer at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import detect_fake_mode, trace
from flashdp_compile.passes.capture import JointGraph

_Key = tuple[Any, ...]


class Emitter:
    """Inlines traced functions before the output of one graph."""

    def __init__(self, joint: JointGraph) -> None:
        self.graph = graph = joint.graph
        self._batch, self._samples = joint.batch, joint.samples
        self._tangents = frozenset(joint.tangents)
        self._output = graph.output_node()
        self._original = list(graph.nodes)
        self._traces: dict[_Key, fx.GraphModule] = {}
        values = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
        self._fake_mode = detect_fake_mode(values)
        self.probe_key: fx.Node | None = None  # of the probes of this release, if norms are estimated

    def __call__(self, function: Callable[..., Any], *operands: fx.Node, key: _Key | None = None) -> Any:
        """The nodes of `function(*operands)`. Calls with equal `key` and equal operand metadata share one trace."""
        values = tuple(n.meta["val"] for n in operands)
        full_key = None if key is None else (*key, *map(signature, values))
        traced = self._traces.get(full_key) if full_key is not None else None
        if traced is None:
            with self._fake_mode or torch.no_grad():
                traced = trace(function, values)
            if full_key is not None:
                self._traces[full_key] = traced
        return inlined(traced, operands, self._output)

    def per_sample(self, function: Callable[..., Any], *operands: fx.Node) -> Any:
        """The nodes of `function(B, *operands)`; B is a number, or the symbolic size of an input that holds samples.

        Clip weights come last: a trace takes a size from the first operand that has it, and what a share is read from
        may not depend on the weights.
        """
        if isinstance(self._batch, int):
            return self(functools.partial(function, self._batch), *operands)
        samples, dim = next(iter(self._samples.items()))
        return self(lambda x, *values: function(x.shape[dim], *values), samples, *operands)

    def settle(self) -> None:
        """Moves every added node to just behind the last value that it needs.

        What needs a tangent comes no earlier than the first node of the backward: torch puts off recomputing what was
        checkpointed only behind the first user of a tangent, so one in front of the forward would keep all of it alive.
        """
        backward = min(
            (i for i, n in enumerate(self._original) if self._tangents.intersection(n.all_input_nodes)), default=0
        )
        inputs = max(i for i, n in enumerate(self._original) if n.op == "placeholder")
        rank = {n: (i, 0) for i, n in enumerate(self._original)}
        for count, node in enumerate(self.graph.nodes):
            if node not in rank:
                latest = max((rank[n][0] for n in node.all_input_nodes), default=0)
                if self._tangents.intersection(node.all_input_nodes):
                    latest = max(latest, backward - 1)
                rank[node] = (max(latest, inputs), count + 1)
        rank[self._output] = (len(self._original), 0)
        for node in sorted((n for n in self.graph.nodes if n is not self._output), key=rank.__getitem__):
            self._output.prepend(node)


def inlined(
    traced: fx.GraphModule, operands: Iterable[fx.Node], before: fx.Node, meta: Mapping[str, Any] | None = None
) -> Any:
    """The results of `traced` as nodes in front of `before`. With `meta` they know that, beside their own values."""
    mapping: dict[fx.Node, Any] = {}
    remaining = iter(operands)
    with before.graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                mapping[node] = next(remaining)
            elif node.op == "output":
                return fx.map_arg(node.args[0], mapping.__getitem__)
            elif node.op == "get_attr":
                raise AssertionError("what is put into a graph may not capture tensors: they belong to one process")
            else:
                new = mapping[node] = before.graph.node_copy(node, mapping.__getitem__)
                if meta is not None:
                    new.meta = {**meta, **{k: node.meta[k] for k in ("val", "tensor_meta") if k in node.meta}}
    raise AssertionError("a traced graph ends in an output")


def signature(value: Any) -> Any:
    """What a trace depends on, of an operand."""
    if isinstance(value, torch.Tensor):
        return (str(tuple(value.shape)), str(value.stride()), str(value.storage_offset()), value.dtype, value.device)
    return str(value)
