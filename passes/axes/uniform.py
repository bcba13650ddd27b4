"""Constants that are the same for every sample, wherever in the batch it stands.

Sample b meets element b of a constant that runs along the batch. If these elements differ, what a sample contributes
depends on its place, and removing one sample, which moves the places of those behind it, changes what they contribute:
far more than one clipped gradient. So a constant may meet the batch only where it is shown to be uniform.

The proof goes backwards: each function of the table below names the operands that must be uniform for a result to be.

Random numbers are a case of their own: any place's are as good as any other's, as long as the sample at that place is
alone in seeing them. The proof enters them into `Site.draws`, and the engine then follows them as it follows samples:
`r = rand(B)` may drop samples by `r < 0.5`, but not by `r < r.mean()`, which drops one according to the others.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from flashdp_compile.compat import OpOverload, size_expression
from flashdp_compile.passes.axes.domain import ZERO, Batched, Constant, Reject, Site, Size, same
from flashdp_compile.passes.axes.registry import UNIFORM, is_pointwise, uniform_step
from flashdp_compile.passes.axes.reshape import reshaped, strides_in_order


class Either(NamedTuple):
    """One of two operands, each with its axis."""

    first: tuple[Any, Batched]
    second: tuple[Any, Batched]


# of a function that is given the node of a result, the axis along which it is to be uniform, and the batch size;
# None if nothing makes it so
Needs = Sequence[tuple[Any, Batched] | Either]


def same_for_all(site: Site, node: Any, state: Any, axis: Batched) -> None:
    """Rejects an operand that is a constant and may differ along `axis`, which is given in its own dimensions.

    Enters one that does run along it into `Site.met`: to see one sample alone, it must be cut like the samples.
    """
    if isinstance(state, Constant) and isinstance(node, fx.Node) and axis.dim >= 0 and _runs_along(node, axis):
        if not site.met.setdefault((site.node, node), axis).aligned(axis):
            raise Reject(f"it reads one constant ({node}) along two dimensions", "pass a clone of it the second time")
    if isinstance(state, Constant) and state != ZERO and not uniform(node, axis, site.batch, site.draws):
        raise Reject(
            f"it joins sample b with element b of a constant or parameter ({node}), so what a sample contributes "
            "depends on its place in the batch",
            "let all samples share it, or pass its rows as an input, with the samples",
        )


def _runs_along(node: fx.Node, axis: Batched) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and not same(_sizes(node)[axis.dim], 1)


def uniform(node: Any, axis: Batched, batch: Size, draws: dict[fx.Node, Batched]) -> bool:
    """Whether the elements (o, b, i) of a constant's dimension `axis.dim` are shown to be equal for all b.

    A negative dimension is one that broadcasting adds. False for whatever is not known. Random numbers that this rests
    on are entered into `draws`, with their own axis.
    """
    if axis.dim < 0 or not isinstance(node.meta.get("val"), torch.Tensor) or same(_sizes(node)[axis.dim], 1):
        return True
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node) or not isinstance(source.target, OpOverload):
        return False
    if source is not node and source.target._opname not in _SEVERAL:
        return False
    step = UNIFORM.get(source.target)
    if step is None and is_pointwise(source.target):
        step = _pointwise
    needs = None if step is None else step(source, axis, batch)
    if needs is None or not all(_met(need, batch, draws) for need in needs):
        return False
    # drawn for one axis, it is no sample's own along another
    return source.target._opname not in _DRAWN or draws.setdefault(source, axis) == axis


def _met(need: tuple[Any, Batched] | Either, batch: Size, draws: dict[fx.Node, Batched]) -> bool:
    if not isinstance(need, Either):
        return uniform(*need, batch, draws)
    for one in need:
        own = dict(draws)  # what it rests on counts only if it holds
        if uniform(*one, batch, own):
            draws.update(own)
            return True
    return False


_DRAWN = frozenset(
    "rand randn randint rand_like randn_like randint_like uniform normal normal_functional bernoulli "
    "native_dropout".split()
)
_SEVERAL = ("native_dropout", "split", "split_with_sizes", "unbind", "var_mean")  # each of their results needs the same


def _sizes(node: fx.Node) -> list[Size]:
    return [size_expression(s) for s in node.meta["val"].shape]


def _rank(node: fx.Node) -> int:
    """That of the first result, if an op has several."""
    value = node.meta["val"]
    return len((value[0] if isinstance(value, (tuple, list)) else value).shape)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


@uniform_step(*"full zeros ones empty full_like zeros_like ones_like empty_like".split())
@uniform_step(*"new_full new_zeros new_ones new_empty new_empty_strided".split())
def _filled(node: Any, axis: Batched, batch: Size) -> Needs:
    """One number everywhere; or nothing yet, and what is read before it is written means nothing anyway."""
    return []


@uniform_step(*"rand randn randint rand_like randn_like randint_like uniform normal_functional".split())
def _drawn(node: Any, axis: Batched, batch: Size) -> Needs:
    """Independent draws from one distribution. (A permutation of the places is not of this kind.)"""
    return []


@uniform_step("native_dropout")
def _dropped(node: Any, axis: Batched, batch: Size) -> Needs:
    return [(node.args[0], axis)]


@uniform_step(
    "bernoulli", "normal", "device_put", "clone", "alias", "detach", "_to_copy", "convert_element_type", "where", "pow"
)
def _pointwise(node: Any, axis: Batched, batch: Size) -> Needs:
    return [(n, axis.at(axis.dim + _rank(n) - _rank(node))) for n in _tensors(node)]


@uniform_step("copy")
def _overwritten(node: Any, axis: Batched, batch: Size) -> Needs:
    source = node.args[1]
    return [(source, axis.at(axis.dim + _rank(source) - _rank(node)))]


@uniform_step("expand")
def _expand(node: Any, axis: Batched, batch: Size) -> Needs:
    """What expand repeats has size one, or no dimension at all."""
    return _pointwise(node, axis, batch)


@uniform_step("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "as_strided")
def _reshape(node: Any, axis: Batched, batch: Size) -> Needs | None:
    if node.target._opname == "as_strided" and not strides_in_order(node):
        return None
    try:
        return [(node.args[0], reshaped(batch, axis, _sizes(node), _sizes(node.args[0])))]
    except Reject:
        return None


@uniform_step("permute")
def _permute(node: Any, axis: Batched, batch: Size) -> Needs:
    return [(node.args[0], axis.at(node.args[1][axis.dim] % _rank(node)))]


@uniform_step("t", "transpose")
def _transpose(node: Any, axis: Batched, batch: Size) -> Needs:
    a, b = (d % _rank(node) for d in (node.args[1:] or (-2, -1)))
    return [(node.args[0], axis.at({a: b, b: a}.get(axis.dim, axis.dim)))]


@uniform_step("repeat")
def _repeat(node: Any, axis: Batched, batch: Size) -> Needs | None:
    """A dimension of size i that is repeated o*B times has the samples outside of it."""
    dim = axis.dim + _rank(node.args[0]) - _rank(node)
    if dim < 0 or same(_sizes(node.args[0])[dim], axis.inner):
        return []
    return [(node.args[0], axis.at(dim))] if node.args[1][axis.dim] == 1 else None


@uniform_step(*"slice flip rev roll constant_pad_nd cumsum _softmax _log_softmax tril triu glu".split())
def _beside(node: Any, axis: Batched, batch: Size) -> Needs | None:
    """Something happens along dimensions that the axis is none of, and the axis keeps its size."""
    rank, name = _rank(node), node.target._opname
    if name == "slice" and same(_sizes(node)[axis.dim], _sizes(node.args[0])[axis.dim]):
        return [(node.args[0], axis)]
    if name in ("flip", "rev", "roll"):
        dims = node.args[-1] if len(node.args) > (name == "roll") + 1 else range(rank)
    elif name == "constant_pad_nd":
        dims = [rank - 1 - k // 2 for k, p in enumerate(node.args[1]) if p != 0]
    else:
        given = [node.args[1]] if len(node.args) > 1 else [-1 if name == "glu" else 0]
        dims = (-2, -1) if name in ("tril", "triu") else given
    return None if axis.dim in [d % rank for d in dims] else [(node.args[0], axis)]


@uniform_step("split", "split_with_sizes")
def _split(node: Any, axis: Batched, batch: Size) -> Needs | None:
    dim = node.args[2] if len(node.args) > 2 else 0
    return None if axis.dim == dim % _rank(node.args[0]) else [(node.args[0], axis)]


@uniform_step("unbind")
def _unbind(node: Any, axis: Batched, batch: Size) -> Needs:
    dim = node.args[1] % _rank(node.args[0]) if len(node.args) > 1 else 0
    return [(node.args[0], axis.at(axis.dim + (dim <= axis.dim)))]


@uniform_step("slice_scatter", "select_scatter")
def _scattered(node: Any, axis: Batched, batch: Size) -> Needs | None:
    x, source = node.args[:2]
    dim = node.args[2] % _rank(x) if len(node.args) > 2 else 0
    if dim == axis.dim:
        return None
    dropped = _rank(source) < _rank(x) and dim < axis.dim
    return [(x, axis), (source, axis.at(axis.dim - dropped))]


@uniform_step("select")
def _select(node: Any, axis: Batched, batch: Size) -> Needs:
    dim = node.args[1] % _rank(node.args[0])
    return [(node.args[0], axis.at(axis.dim + (dim <= axis.dim)))]


@uniform_step(
    "sum", "mean", "amax", "amin", "any", "all", "argmax", "argmin", "prod", "var", "var_mean", "linalg_vector_norm"
)
def _reduce(node: Any, axis: Batched, batch: Size) -> Needs | None:
    rank, own = _rank(node.args[0]), _rank(node)
    if own == rank:
        return [(node.args[0], axis)]
    dims = next((a for a in node.args[1:] if isinstance(a, (list, tuple))), None)
    if not dims:
        dims = [node.args[1]] if len(node.args) > 1 and isinstance(node.args[1], int) else None
    kept = [d for d in range(rank) if dims is not None and d not in [e % rank for e in dims]]
    return [(node.args[0], axis.at(kept[axis.dim]))] if len(kept) == own else None


@uniform_step("cat")
def _cat(node: Any, axis: Batched, batch: Size) -> Needs | None:
    dim = node.args[1] % _rank(node) if len(node.args) > 1 else 0
    return None if dim == axis.dim else [(n, axis) for n in node.args[0]]


@uniform_step("stack")
def _stack(node: Any, axis: Batched, batch: Size) -> Needs | None:
    dim = node.args[1] % _rank(node) if len(node.args) > 1 else 0
    return None if dim == axis.dim else [(n, axis.at(axis.dim - (dim < axis.dim))) for n in node.args[0]]


@uniform_step("mm", "bmm")
def _product(node: Any, axis: Batched, batch: Size) -> Needs:
    """Rows come from the left factor, columns from the right, and the leading dimension of bmm from both."""
    a, b = node.args[:2]
    row, column = _rank(node) - 2, _rank(node) - 1
    return [(n, axis) for n, other in ((a, column), (b, row)) if axis.dim != other]


@uniform_step("addmm")
def _addmm(node: Any, axis: Batched, batch: Size) -> Needs:
    bias, a, b = node.args[:3]
    return [(bias, axis.at(axis.dim + _rank(bias) - 2)), (b, axis) if axis.dim else (a, axis)]


@uniform_step("embedding")
def _embedding(node: Any, axis: Batched, batch: Size) -> Needs:
    table, ids = node.args[:2]
    return [(ids, axis)] if axis.dim < _rank(ids) else [(table, axis.at(1))]


@uniform_step("index", "_unsafe_index")
def _index(node: Any, axis: Batched, batch: Size) -> Needs | None:
    """One index, with its dimensions where the indexed dimension was; or several that start at the first dimension.

    Which row an index names does not matter where all rows are equal: `positions.expand(B, T)[arange(B)[:, None], t]`.
    """
    x, indices = node.args[:2]
    places = [i for i, n in enumerate(indices) if n is not None]
    rank = max(_rank(indices[i]) for i in places)
    if len(places) > 1 and places != list(range(len(places))):
        return None
    start = places[0]
    if start <= axis.dim < start + rank:
        own = [(i, (indices[i], axis.at(axis.dim - start + _rank(indices[i]) - rank))) for i in places]
        return [Either(need, (x, Batched(i))) if same(_sizes(x)[i], batch) else need for i, need in own]
    return [(x, axis.at(axis.dim if axis.dim < start else axis.dim - rank + len(places)))]


@uniform_step("gather", "take_along_dim")
def _gather(node: Any, axis: Batched, batch: Size) -> Needs | None:
    """Rows of x are read at the indices of the same row, along one dimension; another one keeps its size or is cut."""
    x, dim, indices = node.args[:3]
    return None if axis.dim == dim % _rank(node) else [(x, axis), (indices, axis)]


@uniform_step("convolution")
def _convolution(node: Any, axis: Batched, batch: Size) -> Needs | None:
    """Filters see one row of the first dimension at a time."""
    return [(node.args[0], axis)] if axis.dim == 0 else None


@uniform_step(*"avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest2d".split())
@uniform_step(*"upsample_bilinear2d upsample_bicubic2d reflection_pad1d reflection_pad2d replication_pad2d".split())
def _windows(node: Any, axis: Batched, batch: Size) -> Needs | None:
    """Pooling, resizing and padding go along the dimensions behind the channels."""
    spatial = int(node.target._opname[-2])  # "avg_pool2d"
    return [(node.args[0], axis)] if axis.dim < _rank(node) - spatial else None


@uniform_step("unfold")
def _unfold(node: Any, axis: Batched, batch: Size) -> Needs | None:
    """Windows along one dimension, whose elements come last."""
    x, dim = node.args[:2]
    return None if axis.dim in (dim % _rank(x), _rank(node) - 1) else [(x, axis)]
