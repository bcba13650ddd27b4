"""Fused attention: every operand holds the samples in its first dimension, alone."""

from __future__ import annotations

from typing import Any

import torch

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

    Dimension 1 is the heads, 2 the tokens; results of rank 3 and more are per sample, random states are not.
    """
    for node, state in operands_with_states(site, operands, options):
        if len(site.shape(node)) >= 3:
            same_for_all(site, node, state, Batched(0))
        if isinstance(state, Batched) and not state.aligned(Batched(0)):
            raise Reject(
                "it attends over a dimension that holds samples",
                "give attention tensors of shape [batch, heads, tokens, features]",
            )
    results = site.node.meta["val"]
    return tuple(Batched(0) if isinstance(r, torch.Tensor) and r.dim() >= 3 else CONSTANT for r in results)
