"""EmbeddingBag: the rows of a table that a sample's ids name, reduced within the sample; and sparse gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import size_expression
from flashdp_compile.passes.axes.domain import CONSTANT, Batched, Reject, Site, State, same
from flashdp_compile.passes.axes.registry import rule

_IDS = "pass ids of shape [batch, ids per bag], without offsets"
_SPARSE = "its gradient is sparse, so the ids of all samples could be read off it", "use sparse=False"


def _bag(site: Site, indices: State, offsets: Any, *settings: Any) -> Batched:
    """The flat ids' axis, dim 0 = B*T, where bag b begins at b*T: then bag b holds the ids of sample b alone.

    `settings`: scale_grad_by_freq and sparse.
    """
    if settings[0]:
        raise Reject("it divides by how often an id occurs in the batch", "use scale_grad_by_freq=False")
    if settings[1]:
        raise Reject(*_SPARSE)
    counts = isinstance(offsets, fx.Node) and offsets.target is torch.ops.prims.iota.default
    if not (isinstance(indices, Batched) and indices.aligned(Batched(0, 1, indices.inner)) and counts):
        raise Reject("its bags have ends of their own, so a bag may hold ids of several samples", _IDS)
    step = offsets.kwargs["step"]
    step = step.meta["val"] if isinstance(step, fx.Node) else step
    starts_at_zero = offsets.kwargs["start"] == 0
    if not (starts_at_zero and same(size_expression(step), indices.inner) and same(site.shape(offsets)[0], site.batch)):
        raise Reject("its bags are not the samples", _IDS)
    return indices


@rule("aten._sparse_coo_tensor_with_dims_and_tensors")
def sparse_tensor(site: Site, *operands: Any, **options: Any) -> State:
    """The backward of nn.Embedding(sparse=True)."""
    raise Reject(*_SPARSE)


@rule("aten.embedding_renorm")
def embedding_renorm(site: Site, *operands: Any) -> State:
    """nn.Embedding(max_norm=...) changes its table before it reads it."""
    raise Reject(
        "max_norm shortens the rows that the ids of the whole batch name, without noise",
        "use max_norm=None; the rows can be shortened behind the optimizer's step, all of them",
    )


@rule("aten._embedding_bag.default")
def embedding_bag(
    site: Site,
    table: State,
    indices: State,
    offsets: State,
    scale_by_frequency: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: State | None = None,
    *rest: Any,
) -> tuple[State, ...]:
    """One row for each sample. The other results: the bag of each id, the bags' sizes, where maxima were found."""
    ids = _bag(site, indices, site.node.args[2], scale_by_frequency, sparse)
    if isinstance(table, Batched):
        raise Reject("the table that it looks up depends on samples", "look up a table that is the same for all")
    _check_weights(ids, weights)
    if len(rest) > 0 and rest[0]:
        raise Reject("its bags have ends of their own", _IDS)
    return tuple(_place(site, value, ids) for value in site.node.meta["val"])


def _check_weights(ids: Batched, weights: State | None) -> None:
    if weights is not None and not (isinstance(weights, Batched) and weights.aligned(ids)):
        raise Reject("its weights hold the samples in another place than its ids", "pass weights shaped as the ids")


def _place(site: Site, value: torch.Tensor, ids: Batched) -> State:
    size = size_expression(value.shape[0])
    if same(size, site.batch):
        return Batched(0)
    return ids.at(0) if same(size, site.batch * ids.inner) else CONSTANT


@rule("aten._embedding_bag_backward.default")
def embedding_bag_backward(
    site: Site,
    grad: State,
    indices: State,
    offsets: State,
    bag_of_id: State,
    sizes: State,
    maxima: State,
    rows: Any,
    scale_by_frequency: bool,
    mode: int,
    sparse: bool,
    weights: State | None = None,
    *rest: Any,
) -> State:
    """Adds the gradients of a batch's bags into the table."""
    ids = _bag(site, indices, site.node.args[2], scale_by_frequency, sparse)
    _check_weights(ids, weights)
    if not (isinstance(grad, Batched) and grad.aligned(Batched(0))):
        raise Reject("its values and ids hold their samples in different places", "keep the batch in dimension 0")
    return site.point(weight=grad.weight)
