"""Norms and weights of several clipping groups in one launch.

A model that is clipped layer by layer has dozens of groups, and for each a few numbers of every sample: the norms of
its biases and scales, their sum, a weight. What reads the weights of several groups waits for all of them anyway, so
they may as well be computed together, just in front of it:

    clip_factors(sum(v^2, [1]) + n + ..., bound, ...), ...     select(group_weights([v, ...], [n, ...], ...)[0], 0, k)

These are the small gradients that vector_sums adds up, and the layers of one launch of weighted_matmuls. Nothing is
held for longer: vectors until they are summed, norms are small, and what is read by one layer alone does not wait for
others. Runs behind vectors.sum_vectors and group_layers, which decide who waits, and behind the proof; weights differ
by rounding. The call of a release that counts stays as it is, and reads the norms of all groups from here.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from flashdp_compile.compat import argument, sort_topologically
from flashdp_compile.passes.late.norms import erase, rows, squared, terms
from flashdp_compile.passes.nodes import call, is_static

aten, flashdp = torch.ops.aten, torch.ops.flashdp

AT_ONCE = 64  # vectors and norms of one launch: a kernel for hundreds takes long to compile


class Group(NamedTuple):
    """What `clip` computes: weights from the squared norms of `vectors` and from `norms`, which add up to `total`."""

    clip: fx.Node
    total: fx.Node
    vectors: list[fx.Node]
    norms: list[fx.Node]


def clip_groups(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the weights on devices of this type, in place; returns how many groups share launches."""
    place = {node: at for at, node in enumerate(graph.nodes)}
    waiting: dict[Any, list[fx.Node]] = {}
    for clip in graph.find_nodes(op="call_function", target=flashdp.clip_factors.default):
        if clip.users and _read(clip, device) is not None:
            reader = min(clip.users, key=place.__getitem__)
            waiting.setdefault((reader, clip.meta["val"].shape, _rule(clip)), []).append(clip)
    done = 0
    for (reader, _, rule), clips in waiting.items():
        groups = [group for clip in clips if (group := _read(clip, device)) is not None]
        for window in _windows(groups):
            _together(graph, reader, rule, window)
            done += len(window)
    sort_topologically(graph)  # other readers may have come first: the count of bad samples
    return done


def _read(clip: fx.Node, device: str) -> Group | None:
    total = clip.args[0]
    if argument(clip, "counts") or argument(clip, "grad_scale") is not None or total.meta["val"].device.type != device:
        return None
    parts = terms(total)
    vectors = [squared(n, read_once=n is not total) for n in parts]
    norms = [n for n, v in zip(parts, vectors, strict=True) if v is None]
    if not all(_is_norm(n.meta["val"], clip.meta["val"]) for n in norms):
        return None
    return Group(clip, total, [v for v in vectors if v is not None], norms)


def _is_norm(value: torch.Tensor, weights: torch.Tensor) -> bool:
    return is_static(value) and value.dtype == torch.float32 and value.shape == weights.shape


def _rule(clip: fx.Node) -> tuple[Any, ...]:
    return tuple(argument(clip, name) for name in ("fn", "mean", "expected_batch_size"))


def _windows(groups: list[Group]) -> list[list[Group]]:
    """Runs of at least two groups."""
    windows, room = list[list[Group]](), 0
    for group in groups:
        parts = len(group.vectors) + len(group.norms)
        if parts > room:
            windows.append([])
            room = AT_ONCE
        windows[-1].append(group)
        room -= parts
    return [window for window in windows if len(window) > 1]


def _together(graph: fx.Graph, reader: fx.Node, rule: tuple[Any, ...], window: list[Group]) -> None:
    """No norm depends on a weight, as was proved; the sort behind this would find the circle if one did."""
    with graph.inserting_before(reader):
        values = [call(graph, aten.reshape.default, v, rows(v)) for group in window for v in group.vectors]
        norms = [n for group in window for n in group.norms]
        counts = [len(group.vectors) for group in window], [len(group.norms) for group in window]
        bounds = [argument(group.clip, "bound") for group in window]
        both = call(graph, flashdp.group_weights.default, values, norms, *counts, bounds, *rule)
        weights, sqnorms = (call(graph, operator.getitem, both, number) for number in (0, 1))
        for k, group in enumerate(window):
            group.clip.replace_all_uses_with(call(graph, aten.select.int, weights, 0, k))
            graph.erase_node(group.clip)
        columns = call(graph, aten.permute.default, sqnorms, [1, 0])
        _join_columns(window, columns)
        for k, group in enumerate(window):
            if any(_is_column(user) for user in group.total.users):
                total = call(graph, aten.select.int, sqnorms, 0, k)
                group.total.replace_all_uses_with(total, delete_user_cb=_is_column)
            if not group.total.users:
                erase(group.total)
        if not columns.users:
            erase(columns)


def _join_columns(window: list[Group], columns: fx.Node) -> None:
    """The count of bad samples reads the norms of all groups side by side; those of a window become one copy."""
    single = [user for group in window for user in group.total.users if _is_column(user)]
    joins = {user for column in single for user in column.users}
    join = joins.pop() if len(joins) == 1 else columns
    if join.target is not aten.cat.default or argument(join, "dim") != 1:
        return
    rest = [column for column in join.args[0] if column not in single]
    if len(single) != len(window) or len(rest) + len(single) != len(join.args[0]):
        return
    join.args = ([columns, *rest], 1)
    for column in single:
        columns.graph.erase_node(column)


def _is_column(node: fx.Node) -> bool:
    return node.target is aten.unsqueeze.default and node.args[1] == 1
