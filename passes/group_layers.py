"""Norms and clipped sums of several layers in one launch each.

One layer alone leaves part of a device idle in its last round of programs, or is cut into runs of samples whose partial
sums are written and read again; and every launch costs the host as much as a small layer costs the device.

    gram_sqnorm(x, gs, bias), ...                              select(gram_sqnorms([x, ...], [*gs, ...], bias), 0, i)
    weighted_matmul(x, g, weights, key, stream, std), ...      one of the results of weighted_matmuls

A layer waits for others of its window, and its operands are held meanwhile: windows are as large as the peak of memory
allows. Runs behind the proof; values differ by rounding, and the noise is that of (key, stream) as before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import argument, sort_topologically
from flashdp_compile.kernels import FAMILIES, tuning
from flashdp_compile.kernels.common import cdiv
from flashdp_compile.kernels.operands import TMA, layout
from flashdp_compile.passes.memory import Memory
from flashdp_compile.passes.nodes import call, is_static

aten, flashdp = torch.ops.aten, torch.ops.flashdp

ROUNDS = ((3, 8), (1, 3))  # windows of so many rounds of programs, at least and at most: tried in this order
GROWTH = 0.01  # by how much of the peak memory may grow


def group_layers(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the norms and sums on devices of this type, in place; returns how many launches there are fewer."""
    nodes = [n for op in (flashdp.gram_sqnorm, flashdp.weighted_matmul) for n in _on(graph, op.default, device)]
    if len(nodes) < 2:
        return 0
    limit = (1 + GROWTH) * Memory(graph).peak(list(graph.nodes))
    for least, most in ROUNDS:
        trial = fx.Graph()
        trial.output(trial.graph_copy(graph, {}))
        _group(trial, device, least, most)
        if Memory(trial).peak(list(trial.nodes)) <= limit:
            return _group(graph, device, least, most)
    return 0


def _on(graph: fx.Graph, op: Any, device: str) -> list[fx.Node]:
    return [n for n in graph.find_nodes(op="call_function", target=op) if n.meta["val"].device.type == device]


def _group(graph: fx.Graph, device: str, least: int, most: int) -> int:
    fewer = 0
    for op, read, together in (
        (flashdp.gram_sqnorm.default, _read_norm, _norms),
        (flashdp.weighted_matmul.default, _read_sum, _sums),
    ):
        alike: dict[Any, list[fx.Node]] = {}
        for node in _on(graph, op, device):
            if (kind := read(node)) is not None:
                alike.setdefault(kind, []).append(node)
        for nodes in alike.values():
            room = tuning.processors(nodes[0].meta["val"].device)
            for window in _windows(nodes, [_tiles(n) for n in nodes], least * room, most * room, room):
                together(graph, window)
                fewer += len(window) - 1
    sort_topologically(graph)
    return fewer


def _read_norm(norm: fx.Node) -> Any:
    """What norms of one launch have in common; None for a norm that stays alone."""
    x, gs, bias = _values(norm)
    if not all(_is_described(t) for t in (x, *gs)) or not FAMILIES["gram_sqnorms"].supports([x], gs, bias):
        return None
    return len(gs), tuple(bias), x.shape[:2], x.dtype, tuple(g.dtype for g in gs)


def _read_sum(total: fx.Node) -> Any:
    x, g, weights, *_ = _values(total)
    if not all(_is_described(t) for t in (x, g)) or not FAMILIES["weighted_matmul"].supports(x, g, weights):
        return None
    return argument(total, "key"), argument(total, "std"), x.shape[0], x.dtype, g.dtype


def _values(node: fx.Node) -> Any:
    return fx.map_arg(node.args, lambda n: n.meta["val"])


def _is_described(value: torch.Tensor) -> bool:
    return is_static(value) and 0 not in value.shape and layout(value) == TMA


def _tiles(node: fx.Node) -> int:
    """Programs of a clipped sum in the largest tiles; a norm counts as the sum that belongs to it."""
    x, gs, *_ = _values(node)
    gs = gs if isinstance(gs, (list, tuple)) else [gs]
    large = tuning.tiles("weighted_matmul", x.dtype, x.device, (2**30, 1))
    return sum(cdiv(x.shape[2], large.rows) * cdiv(g.shape[2], large.columns) for g in gs)


def _windows(nodes: list[fx.Node], tiles: list[int], least: int, most: int, room: int) -> list[list[fx.Node]]:
    """Runs of nodes with `most` programs or fewer, that take the fewest rounds on a device with room for so many.

    A node with `least` programs or more is in none: it fills the device alone.
    """
    waiting = [at for at, count in enumerate(tiles) if count < least]
    best = [(0, 0, 0)]  # for the first so many: rounds, windows, and where the last of these starts
    for end in range(1, len(waiting) + 1):
        options, total = list[tuple[int, int, int]](), 0
        for start in reversed(range(end)):
            total += tiles[waiting[start]]
            if total > most and options:
                break
            rounds, windows, _ = best[start]
            options.append((rounds + cdiv(total, room), windows + 1, start))
        best.append(min(options))
    found, end = list[list[fx.Node]](), len(waiting)
    while end:
        start = best[end][2]
        if end - start > 1:
            found.insert(0, [nodes[at] for at in waiting[start:end]])
        end = start
    return found


def _norms(graph: fx.Graph, window: Sequence[fx.Node]) -> None:
    with graph.inserting_before(window[-1]):
        xs, gs = [n.args[0] for n in window], [g for n in window for g in n.args[1]]
        norms = call(graph, flashdp.gram_sqnorms.default, xs, gs, list(window[0].args[2]))
        results = [call(graph, aten.select.int, norms, 0, number) for number in range(len(window))]
    _replace(window, results)


def _sums(graph: fx.Graph, window: Sequence[fx.Node]) -> None:
    operands = (list(column) for column in zip(*(n.args[:3] for n in window), strict=True))
    streams = [argument(n, "stream") for n in window]
    key, std = argument(window[0], "key"), argument(window[0], "std")
    with graph.inserting_before(window[-1]):
        sums = call(graph, flashdp.weighted_matmuls.default, *operands, key, streams, std)
        results = [call(graph, operator.getitem, sums, number) for number in range(len(window))]
    _replace(window, results)


def _replace(window: Sequence[fx.Node], results: Sequence[fx.Node]) -> None:
    for node, result in zip(window, results, strict=True):
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)
