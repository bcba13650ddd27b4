"""Convolution, pooling and the like: the samples are the first dimension, and stay there."""

from __future__ import annotations

from typing import Any

from flashdp_compile.passes.axes.domain import Batched, Reject, Site, State
from flashdp_compile.passes.axes.registry import rule
from flashdp_compile.passes.axes.rules_pointwise import operands_with_states
from flashdp_compile.passes.axes.uniform import same_for_all

_FIX = "give the layer a tensor whose first dimension is the batch"


def _first(*states: State) -> str | None:
    """Checks that every operand that carries samples has exactly them in dimension 0."""
    if any(isinstance(s, Batched) and not s.aligned(Batched(0)) for s in states):
        raise Reject("its input does not hold exactly the samples in its first dimension", _FIX)
    return None


@rule("aten.convolution.default")
def convolution(site: Site, x: State, weight: State, bias: State, *rest: Any) -> State:
    """Filters are constant, so every sample is filtered alone."""
    if isinstance(weight, Batched) or isinstance(bias, Batched):
        raise Reject("its filters depend on samples", "per-sample filters are not supported")
    _first(x)
    return Batched(0)


@rule("aten.convolution_backward.default")
def convolution_backward(site: Site, grad: State, x: State, weight: State, *rest: Any) -> tuple[State, ...]:
    """The gradient of the input keeps the axis; those of filters and bias are reduction points."""
    if isinstance(weight, Batched) or not isinstance(grad, Batched):
        raise Reject("its filters depend on samples, or its gradient does not", "per-sample filters are not supported")
    _first(grad, x)
    same_for_all(site, site.node.args[1], x, Batched(0))
    return Batched(0), site.point(1, grad.weight), site.point(2, grad.weight)


@rule(
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.avg_pool1d",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
    "aten.adaptive_max_pool2d",
    "aten.adaptive_max_pool3d",
    "prims._low_memory_max_pool_with_offsets",
    "prims._low_memory_max_pool_offsets_to_indices",
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.reflection_pad3d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
    "aten.replication_pad3d",
    "aten.upsample_nearest2d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa",
    "aten.grid_sampler_2d",
    "aten.grid_sampler_3d",
    "aten.fractional_max_pool2d",
    "aten.fractional_max_pool3d",
    "aten.col2im",
    "aten.im2col",
)
def spatial(site: Site, *operands: Any, **options: Any) -> Any:
    """Acts on the last dimensions of each sample; unbatched input has the batch among them and is rejected."""
    _all_first(site, operands, options)
    _needs_batch(site)
    return _each_result(site)


@rule(
    "aten.max_pool2d_with_indices_backward",
    "aten.max_pool3d_with_indices_backward",
    "aten.avg_pool2d_backward",
    "aten.avg_pool3d_backward",
    "aten._adaptive_avg_pool2d_backward",
    "aten._adaptive_avg_pool3d_backward",
    "aten.adaptive_max_pool2d_backward",
    "aten.upsample_nearest2d_backward",
    "aten.upsample_bilinear2d_backward",
    "aten._upsample_bilinear2d_aa_backward",
    "aten._upsample_bicubic2d_aa_backward",
    "aten.grid_sampler_2d_backward",
    "aten.grid_sampler_3d_backward",
    "aten.fractional_max_pool2d_backward",
    "aten.fractional_max_pool3d_backward",
    "aten.reflection_pad1d_backward",
    "aten.reflection_pad2d_backward",
    "aten.reflection_pad3d_backward",
    "aten.replication_pad1d_backward",
    "aten.replication_pad2d_backward",
    "aten.replication_pad3d_backward",
)
def spatial_backward(site: Site, *operands: Any, **options: Any) -> Any:
    """As the forward op: every sample's own gradient."""
    _all_first(site, operands, options)
    return _each_result(site)


def _all_first(site: Site, *operands: Any) -> None:
    for node, state in operands_with_states(site, operands):
        _first(state)
        same_for_all(site, node, state, Batched(0))


def _needs_batch(site: Site) -> None:
    """Without a batch dimension these ops read dimension 0 as channels; channels would be samples."""
    spatial_rank = {"1": 1, "3": 3}.get(next((c for c in str(site.node.target) if c in "123"), "2"), 2)
    if site.arg_rank() < spatial_rank + 2:
        raise Reject("its input has no batch dimension, so the samples are read as channels", _FIX)


def _each_result(site: Site) -> Any:
    value = site.node.meta["val"]
    return tuple(Batched(0) for _ in value) if isinstance(value, (tuple, list)) else Batched(0)
