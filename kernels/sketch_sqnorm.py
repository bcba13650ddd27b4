"""Squared norms of per-sample weight gradients, estimated from their products with Gaussian probes.

    out[b] = |sum_l x_b^T g_lb P_l|_F^2          x [B, T, d], g_l [B, T, p_l], P_l [p_l, probes] -> [B]

is, given x and g, distributed as |M|_F^2 sum_i lambda_i chi^2_probes(i) / probes with M = x_b^T [g_1b g_2b ...] and
lambda the squared singular values of M over |M|_F^2: an unbiased estimate of the squared norm of all these gradients
together (Ullah et al. 2026, arXiv 2605.24879; docs/randomized_clipping.md). It takes 2 T probes (d + sum p_l)
multiplications with additions for each sample, as probes are two bfloat16, where the norm itself takes T d sum p_l, and
memory for neither a product d x p nor the tokens' pairs.

The kernels and their rounding: sketches.py, here with h = sum_l g_l P_l.
"""

import torch
from torch import Tensor

from flashdp_compile.kernels import sketches
from flashdp_compile.kernels.common import accumulator, example_key, randn, widen
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.probes import LEAST, probe_matrix
from flashdp_compile.kernels.sketches import PROJECT, Projection, draw, estimate, lengths, project, projection, sketch


def reference(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Tensor:
    x, *gs = widen(x, *gs)
    h = sum(g @ probe_matrix(key, s, g.shape[2], probes, g.dtype) for g, s in zip(gs, streams, strict=True))
    return estimate(x.mT @ h, lengths(x) * lengths(h), x.shape[1])


def fake(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, *gs))


def specialise(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Projection:
    return projection(gs, probes)


def launch(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> Tensor:
    if 0 in (*x.shape, *(size for g in gs for size in g.shape)):
        return x.new_zeros(x.shape[0], dtype=torch.float32)
    h, of_h = project(gs, [draw(key, s, g.shape[2], probes) for g, s in zip(gs, streams, strict=True)])
    y, of_x = sketch(x, h)
    return estimate(y, (of_h.sum(1) * of_x.sum(1)).sqrt(), x.shape[1])


def supports(x: Tensor, gs: list[Tensor], key: Tensor, streams: list[int], probes: int) -> bool:
    return sketches.supports([x, *gs], probes)


def example(case, dtype, device, generator):
    B, T, d, *widths = case
    key = example_key(device)
    gs = [randn((B, T, p), dtype, device, generator) for p in widths]
    return randn((B, T, d), dtype, device, generator), gs, key, [7 + 1000003 * n for n in range(len(gs))], LEAST


FAMILY = Family(
    name="sketch_sqnorm",
    schema="(Tensor x, Tensor[] gs, Tensor key, int[] streams, int probes) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=PROJECT.template,
    cases=((3, 5, 7, 9), (2, 4161, 33, 20, 35), (1, 1, 1, 1), (3, 130, 130, 1, 2), (0, 4, 3, 2), (2, 0, 3, 2)),
    example=example,
    supports=supports,
)
