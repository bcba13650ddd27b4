"""Reading and writing by index: a sample may use its own indices into constants and into itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashdp_compile.passes.axes.domain import ZERO, Batched, Constant, Reduced, Reject, Site, State, same
from flashdp_compile.passes.axes.registry import linear, rule
from flashdp_compile.passes.axes.rules_pointwise import broadcast, operands_with_states
from flashdp_compile.passes.axes.uniform import same_for_all

_FIX = "index a feature dimension, or a constant table, with the sample's own indices"


@dataclass(frozen=True)
class Indexing:
    """How `x[indices]` lays out its result: dimensions of x that are not indexed, and the indices' own dimensions.

    nodes     one index (or None) per leading dimension of x
    start     where the indices' broadcast dimensions begin in the result;  rank  how many they are
    slots     the dimensions of x that are not indexed, in order;  places  where they land in the result
    axis      the batch axis among the indices' dimensions, if an index carries samples
    """

    nodes: list[Any]
    start: int
    rank: int
    slots: list[int]
    places: list[int]
    axis: Batched | None

    def place(self, dim: int) -> int:
        return self.places[self.slots.index(dim)]

    def slot(self, place: int) -> int:
        return self.slots[self.places.index(place)]


def indexing(site: Site, nodes: list[Any], indices: list[State | None], rank_of_x: int) -> Indexing:
    """The layout of an advanced indexing; rejects indices that hold their samples in different places."""
    positions = [i for i, n in enumerate(nodes) if n is not None]
    if any(nodes[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in positions):
        raise Reject("a mask as an index picks a number of elements that depends on data", "use torch.where")
    rank = max(len(site.shape(nodes[i])) for i in positions)
    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    start = positions[0] if adjacent else 0
    axes = {
        Batched(s.dim + rank - len(site.shape(n)), s.outer, s.inner)
        for s, n in zip(indices, nodes, strict=True)
        if isinstance(s, Batched)
    }
    if len(axes) > 1:
        raise Reject("its indices hold their samples in different places", _FIX)
    slots = [d for d in range(rank_of_x) if d not in positions]
    places = [d for d in range(len(slots) + rank) if not start <= d < start + rank]
    return Indexing(nodes, start, rank, slots, places, axes.pop() if axes else None)


def _same_for_all(site: Site, layout: Indexing, indices: list[State | None], axis: Batched, but: int = -1) -> None:
    """Constant indices beside those of samples must not tell the samples apart; `axis` is one of their dimensions."""
    for slot, (node, state) in enumerate(zip(layout.nodes, indices, strict=True)):
        if node is not None and slot != but:
            same_for_all(site, node, state, axis.at(axis.dim + len(site.shape(node)) - layout.rank))


_RESHAPES = (
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.view.default,
    torch.ops.aten.expand.default,
    torch.ops.prims.convert_element_type.default,
)


def _slices_nothing_off(site: Site, node: fx.Node) -> bool:
    """A slice from end to end, which torch leaves in the graph where it does not know the size."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    return all(same(a, b) for a, b in zip(site.shape(node), site.shape(node.args[0]), strict=True))


def _counting(site: Site, layout: Indexing, sizes: list[Any]) -> tuple[int, Batched] | None:
    """The dimension of x that is indexed by 0, 1, ..., B-1, and where that index runs: sample b asks for row b."""
    for slot, node in enumerate(layout.nodes):
        if node is None or not same(sizes[slot], site.batch):
            continue
        shape = site.shape(node)
        while isinstance(node, fx.Node) and (node.target in _RESHAPES or _slices_nothing_off(site, node)):
            node = node.args[0]
        is_count = isinstance(node, fx.Node) and node.target is torch.ops.prims.iota.default
        if not is_count or node.kwargs.get("start") != 0 or node.kwargs.get("step") != 1:
            continue
        runs = [d for d, s in enumerate(shape) if not same(s, 1)] or [0]
        if len(runs) == 1 and same(site.shape(node)[0], site.batch):
            return slot, Batched(runs[0] + layout.rank - len(shape))
    return None


def read(site: Site, x: State, indices: list[State | None], nodes: list[Any]) -> State:
    """The axis of x[indices]."""
    sizes = site.arg_shape()
    layout = indexing(site, nodes, indices, len(sizes))
    if not isinstance(x, Batched):
        assert layout.axis is not None
        _same_for_all(site, layout, indices, layout.axis)
        return layout.axis.at(layout.axis.dim + layout.start)
    if x.dim in layout.slots:
        if layout.axis is not None:
            raise Reject("every sample is indexed by every other sample's indices", _FIX)
        return Batched(layout.place(x.dim), x.outer, x.inner)
    counting = _counting(site, layout, sizes)
    if counting is None or counting[0] != x.dim or (x.outer, x.inner) != (1, 1):
        raise Reject("it indexes along the batch, so samples read one another", _FIX)
    if layout.axis not in (None, counting[1]):
        raise Reject("its indices hold their samples in different places", _FIX)
    _same_for_all(site, layout, indices, counting[1], but=counting[0])
    return counting[1].at(counting[1].dim + layout.start)


_COUNTS = "it counts how often an index occurs in the batch", "use scale_grad_by_freq=False in embeddings"


def write(site: Site, x: State, indices: list[State | None], values: State, nodes: list[Any], adds: bool) -> State:
    """The axis of x after x[indices] (+)= values."""
    sizes = site.arg_shape()
    layout = indexing(site, nodes, indices, len(sizes))
    axis = None
    value_node = site.node.args[3] if site.node.target in _MASKED else site.node.args[2]

    def check_values(place: Batched) -> None:
        """`place`: the samples' axis in what is written, x[indices]."""
        rank = len(layout.places) + layout.rank
        same_for_all(site, value_node, values, place.at(place.dim + len(site.shape(value_node)) - rank))

    if isinstance(values, Batched):
        axis = values.at(values.dim + len(layout.places) + layout.rank - len(site.shape(value_node)))
    among_indices = axis is not None and layout.start <= axis.dim < layout.start + layout.rank
    runs = axis.at(axis.dim - layout.start) if axis is not None and among_indices else None

    counting = _counting(site, layout, sizes)
    if counting is not None:
        slot, own = counting
        target = x.dim == slot and (x.outer, x.inner) == (1, 1) if isinstance(x, Batched) else True
        if target and layout.axis in (None, own) and (axis is None or (runs is not None and runs.aligned(own))):
            same_for_all(site, site.node.args[0], x, Batched(slot))
            _same_for_all(site, layout, indices, own, but=slot)
            check_values(own.at(own.dim + layout.start))
            return Batched(slot)
    if layout.axis is None and not among_indices:  # constant places, the same for every sample
        place = layout.slot(axis.dim) if axis is not None else None
        if isinstance(x, Batched) and x.dim in layout.slots and place in (None, x.dim):
            moved = axis.at(x.dim) if axis is not None else x
            if moved.aligned(x):
                check_values(x.at(layout.place(x.dim)))
                return Batched(x.dim, x.outer, x.inner)
        elif isinstance(x, Constant) and place is not None and axis is not None:
            same_for_all(site, site.node.args[0], x, axis.at(place))
            return Batched(place, axis.outer, axis.inner)
    if isinstance(x, Constant) and runs is not None and adds and (layout.axis is None or layout.axis.aligned(runs)):
        if x != ZERO:
            raise Reject("it adds samples into a table that is not zero")
        _same_for_all(site, layout, indices, runs)
        return site.point(weight=values.weight if isinstance(values, Batched) else None)
    if adds and isinstance(x, Constant) and not isinstance(values, Batched):
        raise Reject(*_COUNTS)
    raise Reject("it writes samples' values at places that other samples share", _FIX)


_MASKED = (
    [torch.ops.aten._unsafe_masked_index_put_accumulate.default]
    if hasattr(torch.ops.aten, "_unsafe_masked_index_put_accumulate")
    else []
)


def _mask_agrees(site: Site, mask: State, with_state: State, rank: int) -> None:
    if isinstance(with_state, Batched):
        same_for_all(site, site.node.args[1], mask, with_state.at(with_state.dim + site.arg_rank(1) - rank))
    if isinstance(mask, Batched) and isinstance(with_state, Batched):
        if not mask.at(mask.dim + rank - site.arg_rank(1)).aligned(with_state):
            raise Reject("its mask holds the samples in another place", _FIX)


def _reads_at_constants(x: Any, *rest: Any) -> bool:
    """Elements of a batch sum, by places that no sample has chosen."""
    states = [s for r in rest for s in (r if isinstance(r, (list, tuple)) else [r])]
    return isinstance(x, Reduced) and not any(isinstance(s, Reduced) for s in states)


@rule("aten.index.Tensor", "aten._unsafe_index.Tensor", linear=_reads_at_constants)
def index(site: Site, x: State, indices: list[State | None]) -> State:
    """Reading by constant indices off the batch, or by a sample's own indices from a constant or from itself."""
    return read(site, x, indices, list(site.node.args[1]))


@rule("aten._unsafe_masked_index.default")
def masked_index(site: Site, x: State, mask: State, indices: list[State | None], fill: Any) -> State:
    """As index, with a mask that broadcasts against the result."""
    if not isinstance(x, Batched) and not any(isinstance(s, Batched) for s in indices):
        raise Reject("its mask carries samples that its other operands lack", _FIX)
    result = read(site, x, indices, list(site.node.args[2]))
    _mask_agrees(site, mask, result, len(site.shape()))
    return result


@rule("aten.index_put.default", "aten._unsafe_index_put.default")
def index_put(site: Site, x: State, indices: list[State | None], values: State, accumulate: bool = False) -> State:
    """The backward of an embedding or of indexing; without accumulation two samples could overwrite each other."""
    return write(site, x, indices, values, list(site.node.args[1]), accumulate)


@rule("aten._unsafe_masked_index_put_accumulate.default")
def masked_index_put(site: Site, x: State, mask: State, indices: list[State | None], values: State) -> State:
    """The backward of an embedding (torch 2.13) and of masked indexing; the mask leaves out values, padding say."""
    _mask_agrees(site, mask, values, len(site.shape(site.node.args[3])))
    if not isinstance(values, Batched):
        if any(isinstance(s, Batched) for s in indices):
            raise Reject(*_COUNTS)
        raise Reject("its mask may differ from sample to sample where its values are the same for all", _FIX)
    return write(site, x, indices, values, list(site.node.args[2]), adds=True)


@rule("aten.embedding.default")
def embedding(site: Site, table: State, ids: State, *rest: Any) -> State:
    """Looking up a constant table keeps the axis of the indices."""
    if isinstance(table, Batched):
        raise Reject("the table that it looks up depends on samples", _FIX)
    assert isinstance(ids, Batched)
    return Batched(ids.dim, ids.outer, ids.inner)


@rule("aten.embedding_dense_backward")
def embedding_backward(site: Site, grad: State, ids: State, rows: Any, padding: int, scale_by_frequency: bool) -> State:
    """Adds the gradients of a batch's tokens into the table."""
    if scale_by_frequency:
        raise Reject("it divides by how often a token occurs in the batch", "use scale_grad_by_freq=False")
    if not (isinstance(grad, Batched) and isinstance(ids, Batched) and grad.aligned(ids)):
        raise Reject("its values and indices hold their samples in different places", _FIX)
    return site.point(weight=grad.weight)


@rule("aten.gather", "aten.take_along_dim")
def gather(site: Site, x: State, dim: int, indices: State, **options: Any) -> State:
    """Each sample reads along a feature dimension by its own indices."""
    if dim % len(site.shape()) in [s.dim for s in (x, indices) if isinstance(s, Batched)]:
        raise Reject("it gathers along the batch", _FIX)
    # gather pairs index position b with row b of x, so both sides hold the samples, or one is the same in every row
    result = broadcast(site, x, indices)
    assert isinstance(result, Batched)
    if not same(site.shape()[result.dim], site.arg_shape()[result.dim]):
        raise Reject("it gathers from a part of the batch", _FIX)
    return result


@rule("aten.scatter.src", "aten.scatter_add", "aten.scatter.value", "aten.scatter_reduce.two")
def scatter(site: Site, x: State, dim: int, indices: State, source: Any = None, *rest: Any, **options: Any) -> State:
    """Each sample writes along a feature dimension at its own indices."""
    batched = [s for s in (x, indices, source) if isinstance(s, Batched)]
    if any(not s.aligned(batched[0]) for s in batched):
        raise Reject("its operands hold their samples in different places", _FIX)
    if batched[0].dim == dim % len(site.shape()):
        raise Reject("it scatters along the batch", _FIX)
    for node, state in operands_with_states(site, x, indices, source):
        if site.shape(node):
            same_for_all(site, node, state, batched[0])
    if not same(site.arg_shape(2)[batched[0].dim], site.shape()[batched[0].dim]):
        raise Reject("it scatters into a part of the batch", _FIX)
    return Batched(batched[0].dim, batched[0].outer, batched[0].inner)


@rule("aten.index_select")
def index_select(site: Site, x: State, dim: int, indices: State) -> State:
    """Selecting features by constant indices keeps the axis; a constant may be read by a sample's indices."""
    if isinstance(x, Batched) and isinstance(indices, Constant) and dim % site.arg_rank() != x.dim:
        return Batched(x.dim, x.outer, x.inner)
    if isinstance(indices, Batched) and isinstance(x, Constant):
        return Batched(dim % site.arg_rank(), indices.outer, indices.inner)
    raise Reject("it selects along the batch", _FIX)


def _values_only(x: Any, *rest: Any) -> bool:
    """Adding batch sums into zeros at constant places is linear in them (the table of positions, for one)."""
    states = [s for r in rest for s in (r if isinstance(r, (list, tuple)) else [r])]
    *others, values = [s for s in states if isinstance(s, (Constant, Reduced))]
    return (
        (x == ZERO or isinstance(x, Reduced))
        and isinstance(values, Reduced)
        and not any(isinstance(s, Reduced) for s in others)
    )


linear(_values_only, "aten.index_put.default", "aten._unsafe_index_put.default", *map(str, _MASKED))
