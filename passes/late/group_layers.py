"""Norms and clipped sums of several layers in one launch each.

One layer alone leaves part of a device idle in its last round of programs, or is cut into runs of samples whose partial
sums are written and read again; and every launch costs the host as much as a small layer costs the device.

    gram_sqnorm(x, gs, bias), ...                              select(gram_sqnorms([x, ...], [*gs, ...], bias), 0, i)
    weighted_matmul(x, g, weights, key, stream, std), ...      one of the results of weighted_matmuls
    outer_store(x, g), ...                                     select(one of the results of outer_stores, 0, i), ...
    product_sum(product, weights, key, stream, std), ...       one of the results of product_sums

A layer waits for others of its window, and its operands are held meanwhile: windows are as large as the peak of memory
allows (windows.py). Runs behind the proof; values differ by rounding, and the noise is that of (key, stream) as before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from flashdp_compile.compat import argument, sort_topologically
from flashdp_compile.kernels import FAMILIES, hopper, outer_stores, product_sums, tuning
from flashdp_compile.kernels.common import cdiv
from flashdp_compile.kernels.operands import TMA, layout
from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.late.windows import Fitting
from flashdp_compile.passes.nodes import call, is_static

aten, flashdp = torch.ops.aten, torch.ops.flashdp

SHORTER = 8  # times as many rounds of programs that make one sample's products, and not a sum over all
LIMIT = 0.85  # of the peak, below which layers wait for others: at 32k tokens the model of it leaves out the rest


class Grouping(NamedTuple):
    """How launches of an op become one: what those of one launch have in common (None for one that stays alone), how
    many programs each has, what replaces a window, how many times as many rounds as windows.ROUNDS says it has, and of
    which op the calls that read it become one launch later."""

    op: Any
    read: Callable[[fx.Node], Any]
    tiles: Callable[[fx.Node], int]
    together: Callable[[fx.Graph, Sequence[fx.Node]], None]
    rounds: int = 1
    then: Any = None


def group_layers(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the norms and sums on devices of this type, in place; returns how many launches there are fewer."""
    limit, fewer = 0.0, 0
    for grouping in GROUPINGS:
        if alike := _alike(graph, grouping, device):
            limit = limit or LIMIT * Memory(graph).peak(list(graph.nodes))
            fewer += _group(graph, grouping, alike, limit)
    return fewer


def _group(graph: fx.Graph, grouping: Grouping, alike: list[list[fx.Node]], limit: float) -> int:
    fitting, windows = Fitting(graph, limit, grouping.then), list[list[fx.Node]]()
    for nodes in alike:
        room = tuning.processors(nodes[0].args[0].meta["val"].device)
        windows += fitting.windows(nodes, grouping.tiles, grouping.rounds, room)
    for window in windows:
        grouping.together(graph, window)
    sort_topologically(graph)
    return sum(len(window) - 1 for window in windows)


def _alike(graph: fx.Graph, grouping: Grouping, device: str) -> list[list[fx.Node]]:
    """Nodes on such devices that may share launches, with others."""
    found: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=grouping.op):
        if node.args[0].meta["val"].device.type == device and (kind := grouping.read(node)) is not None:
            found.setdefault(kind, []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


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


def _read_store(store: fx.Node) -> Any:
    """Only the kernel in Gluon stores for several layers."""
    x, g = _values(store)
    if not all(_is_described(t) for t in (x, g)):
        return None
    if not FAMILIES["outer_stores"].stays_op([x], [g], [0]):
        return None
    return x.shape[0], x.dtype


def _read_product_sum(total: fx.Node) -> Any:
    """Sums wait for each other only where their products were stored together: Inductor may keep what it would free for
    a later value of the same size, and kept products of other launches so while the head was stored (2.13)."""
    product, weights, *_ = _values(total)
    made = total.args[0]
    while isinstance(made, fx.Node) and made.target in (aten.select.int, operator.getitem):
        made = made.args[0]
    if made.target is not flashdp.outer_stores.default or not product_sums.is_flat(product):
        return None
    if product.shape[1] * product.shape[2] >= 2**31:  # sizes of several layers are passed in 32 bits
        return None
    return made, argument(total, "key"), argument(total, "std"), product.shape[0], product.dtype


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


def _tiles_of_store(node: fx.Node) -> int:
    x, g = _values(node)
    return x.shape[0] * cdiv(x.shape[2], hopper.STORED.rows) * cdiv(g.shape[2], hopper.STORED.columns)


def _tiles_of_sum(node: fx.Node) -> int:
    """As many as its products had: where all are stored in windows, these are windows of the sums as well."""
    B, d, p = node.args[0].meta["val"].shape
    return B * cdiv(d, hopper.STORED.rows) * cdiv(p, hopper.STORED.columns)


def _norms(graph: fx.Graph, window: Sequence[fx.Node]) -> None:
    with graph.inserting_before(window[-1]):
        xs, gs = [n.args[0] for n in window], [g for n in window for g in n.args[1]]
        norms = call(graph, flashdp.gram_sqnorms.default, xs, gs, list(window[0].args[2]))
        results = [call(graph, aten.select.int, norms, 0, number) for number in range(len(window))]
    _replace(window, results)


def _sums(op: Any, *operands: str) -> Callable[[fx.Graph, Sequence[fx.Node]], None]:
    """By one call of `op`, which takes a list for each of these arguments."""

    def together(graph: fx.Graph, window: Sequence[fx.Node]) -> None:
        columns = [[argument(n, name) for n in window] for name in operands]
        streams = [argument(n, "stream") for n in window]
        key, std = argument(window[0], "key"), argument(window[0], "std")
        with graph.inserting_before(window[-1]):
            sums = call(graph, op, *columns, key, streams, std)
            results = [call(graph, operator.getitem, sums, number) for number in range(len(window))]
        _replace(window, results)

    return together


def _stores(graph: fx.Graph, window: Sequence[fx.Node]) -> None:
    xs, gs = ([n.args[at] for n in window] for at in (0, 1))
    shapes = [n.meta["val"][0].shape[1:] for n in window]
    stores = [list(dict.fromkeys(shapes)).index(shape) for shape in shapes]
    with graph.inserting_before(window[-1]):
        made = call(graph, flashdp.outer_stores.default, xs, gs, stores)
        *kept, norms = [call(graph, operator.getitem, made, at) for at in range(2 + max(stores))]
        results = [
            (call(graph, aten.select.int, kept[store], 0, place), call(graph, aten.select.int, norms, 0, number))
            for number, (store, place) in enumerate(outer_stores.places(stores))
        ]
    for node, parts in zip(window, results, strict=True):
        for part in list(node.users):
            part.replace_all_uses_with(parts[part.args[1]])
            graph.erase_node(part)
        graph.erase_node(node)


def _replace(window: Sequence[fx.Node], results: Sequence[fx.Node]) -> None:
    for node, result in zip(window, results, strict=True):
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)


_weighted_matmuls = _sums(flashdp.weighted_matmuls.default, "x", "g", "weights")
_product_sums = _sums(flashdp.product_sums.default, "product", "weights")
GROUPINGS = (
    Grouping(flashdp.gram_sqnorm.default, _read_norm, _tiles, _norms),
    Grouping(flashdp.weighted_matmul.default, _read_sum, _tiles, _weighted_matmuls),
    Grouping(flashdp.outer_store.default, _read_store, _tiles_of_store, _stores, SHORTER, flashdp.product_sum.default),
    Grouping(flashdp.product_sum.default, _read_product_sum, _tiles_of_sum, _product_sums, SHORTER),
)
