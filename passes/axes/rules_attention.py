"""Fused attention: every operand holds the samples in its first dimension, alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flashdp_compile.passes.axes.domain import CONSTANT, Batched, Reject, Site
from flashdp_compile.passes.axes.registry import rule
from flashdp_compile.passes.axes.rules_pointwise import operands_with_states
from flashdp_compile.passes.axes.uniform import same_for_all


@rule(
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_backward",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_efficient_attention_backward",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_cudnn_attention_backward",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten._scaled_dot_product_fused_attention_overrideable_backward",
)
def attention(site: Site, *operands: Any, **options: Any) -> Any:
    """Attends within a sample when dimension 0 of query, key, value and mask holds exactly the samples.

    Dimension 1 is the heads, 2 the tokens; results of rank 3 and more are per sample, random states are not. A mask
    is broadcast from the right: one of fewer dimensions than the query has none that could hold the samples.
    """
    masks = _masks(site)
    for node, state in operands_with_states(site, operands, options):
        missing = site.arg_rank() - len(site.shape(node)) if node in masks else 0
        if len(site.shape(node)) >= 3:
            same_for_all(site, node, state, Batched(-missing))
        if isinstance(state, Batched) and missing:
            raise Reject(
                "its mask is broadcast, so a sample's rows of it hide the tokens of all samples",
                "give the mask the shape [batch, 1, tokens, tokens], for padding mask[:, None, None, :]",
            )
        if isinstance(state, Batched) and not state.aligned(Batched(0)):
            raise Reject(
                "it attends over a dimension that holds samples",
                "give attention tensors of shape [batch, heads, tokens, features]",
            )
    results = site.node.meta["val"]
    return tuple(Batched(0) if isinstance(r, torch.Tensor) and r.dim() >= 3 else CONSTANT for r in results)


def _masks(site: Site) -> list[fx.Node]:
    """The operands that are added to the scores: attn_mask and attn_bias."""
    names = [a.name for a in site.node.target._schema.arguments]
    bound = dict(zip(names, site.node.args, strict=False)) | dict(site.node.kwargs)
    return [n for name, n in bound.items() if name in ("attn_mask", "attn_bias") and isinstance(n, fx.Node)]
