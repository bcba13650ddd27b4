"""The ops that the rewrite adds. They let the finished graph be proved by the same sweep as the original one."""

from __future__ import annotations

from typing import Any

import torch

from flashdp_compile.kernels import catalogue  # noqa: F401  registers the kernels' ops
from flashdp_compile.passes.axes.domain import Batched, Reject, Site, State
from flashdp_compile.passes.axes.registry import NO_DATA, RULES, first_reduced, linear, rule

_SAMPLES = Batched(0)


def _leading(*states: Any) -> None:
    """These ops take tensors whose first dimension is exactly the batch; weights and keys are checked by their rule."""
    for state in states:
        for s in state if isinstance(state, (list, tuple)) else [state]:
            if isinstance(s, Batched) and not s.aligned(_SAMPLES):
                raise Reject(f"{s} where the samples must come first")


@rule(
    "flashdp.gram_sqnorm",
    "flashdp.outer_sqnorm",
    "flashdp.embedding_sqnorm",
    "flashdp.tied_cross",
    "flashdp.stored_cross",
    "flashdp.sketch_sqnorm",
    "flashdp.tied_sketch_sqnorm",
    "flashdp.hutchpp_sqnorm",
)
def sqnorm(site: Site, *operands: Any) -> State:
    """One number per sample. Probes, by which some are estimated, hold no sample's data."""
    _leading(*operands)
    return _SAMPLES


@rule("flashdp.outer_store")
def outer_store(site: Site, x: State, g: State) -> tuple[State, State]:
    """Every sample's product and its squared norm."""
    _leading(x, g)
    return _SAMPLES, _SAMPLES


def clip_factors(site: Site, norms: Batched, *policy: Any) -> State:
    """Weights that depend on each sample's own norm. From here on values are weighted by this node's weights."""
    _leading(norms, *policy)  # the norms of other groups are among the policy: they are counted only
    return Batched(0, weight=site.node.name)


def share_bound(site: Site, norms: Batched, place: Any) -> State:
    """Norms over shares that come from each sample's own norms in all parts of a model."""
    _leading(norms)
    return _SAMPLES


def count_within(site: Site, scales: State, norms: Any, *policy: Any) -> State:
    """The scales again, which hold no sample's data; that samples are counted on the way is the engine's affair."""
    _leading(norms)
    return scales


def register_runtime_ops() -> None:
    """Enters the ops that the runtime defines; called once they are registered with torch."""
    RULES[torch.ops.flashdp.clip_factors.default] = clip_factors
    flashdp = torch.ops.flashdp
    without = (flashdp.draw_key, flashdp.draw_probe_key, flashdp.grad_scale, flashdp.bound_scales)
    NO_DATA.update(op.default for op in without)
    RULES[flashdp.count_within.default] = count_within
    RULES[flashdp.share_bound.default] = share_bound


@rule("flashdp.weighted_matmul", "flashdp.embedding_sum")
def weighted_sum(site: Site, x: State, g: State, weights: State, *rest: Any) -> State:
    """A reduction point whose samples are weighted."""
    _leading(x, g, weights)
    return site.point(weight=weights.weight if isinstance(weights, Batched) else None)


@rule("flashdp.product_sum")
def product_sum(site: Site, product: State, weights: State) -> State:
    """A reduction point whose samples are weighted."""
    return weighted_sum(site, product, product, weights)


linear(first_reduced, "flashdp.add_noise.default")
