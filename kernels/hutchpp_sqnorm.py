"""Squared norms of per-sample weight gradients by Hutch++: what lies in a small space exactly, the rest by probes.

    Q = an orthonormal basis of the columns of M M^T S        M = x_b^T g_b, S [d, probes] Gaussian
    out[b] = |Q^T M|_F^2 + |(1 - Q Q^T) M P|_F^2              P [p, probes] Gaussian, independent of S

x [B, T, d], g [B, T, p] -> [B]. Unbiased, as Q does not depend on P. Large singular values of M mostly lie in the space
that M M^T S spans, so it varies less than |M P|^2; what may be said of its worst case is the same (Ullah et al. 2026,
arXiv 2605.24879, after Meyer, Musco, Musco and Woodruff 2021). It takes four times the multiplications, and one QR
decomposition [d, probes] for each sample.

S is of stream streams_0, P of streams_1. Where d is at most `probes` the first part is all, and exact.
"""

import torch
from torch import Tensor

from flashdp_compile.kernels import sketches
from flashdp_compile.kernels.common import accumulator, example_key, randn, widen
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.probes import LEAST, probe_matrix
from flashdp_compile.kernels.sketches import (
    PROJECT,
    Projection,
    draw,
    estimate,
    in_halves,
    lengths,
    project,
    projection,
    sketch,
)


def reference(x: Tensor, g: Tensor, key: Tensor, streams: list[int], probes: int) -> Tensor:
    x, g = widen(x, g)
    S = probe_matrix(key, streams[0], x.shape[2], probes, x.dtype)
    P = probe_matrix(key, streams[1], g.shape[2], probes, x.dtype)
    Q = _basis(x.mT @ (g @ (g.mT @ (x @ S))))
    a, h = x @ Q, g @ P
    return _both(g.mT @ a, x.mT @ h, Q, lengths(g) * lengths(a) + lengths(x) * lengths(h), x.shape[1])


def _basis(spanning: Tensor) -> Tensor:
    """Q [B, d, min(d, probes)]. Scaled first: a power of M's singular values may leave the range of float32."""
    largest = spanning.abs().amax((1, 2), keepdim=True)
    return torch.linalg.qr(spanning / torch.where(largest > 0, largest, 1))[0]


def _both(head: Tensor, y: Tensor, Q: Tensor, length: Tensor, tokens: int) -> Tensor:
    """From M^T Q and M P."""
    tail = y - Q @ (Q.mT @ y)
    return estimate(torch.cat([head.flatten(1), tail.flatten(1)], 1)[..., None], length, tokens)


def fake(x: Tensor, g: Tensor, key: Tensor, streams: list[int], probes: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, g))


def specialise(x: Tensor, g: Tensor, key: Tensor, streams: list[int], probes: int) -> Projection:
    return projection([g], probes)


def launch(x: Tensor, g: Tensor, key: Tensor, streams: list[int], probes: int) -> Tensor:
    if 0 in (*x.shape, *g.shape) or x.shape[2] < probes:
        return reference(x, g, key, streams, probes)
    a, _ = project([x], [draw(key, streams[0], x.shape[2], probes)])
    b, _ = sketch(g, a)
    c, _ = project([g], [in_halves(b)])
    spanning, _ = sketch(x, c)
    Q = _basis(spanning)
    a, of_a = project([x], [in_halves(Q)])
    head, of_g = sketch(g, a)
    h, of_h = project([g], [draw(key, streams[1], g.shape[2], probes)])
    y, of_x = sketch(x, h)
    length = (of_g.sum(1) * of_a.sum(1)).sqrt() + (of_x.sum(1) * of_h.sum(1)).sqrt()
    return _both(head, y, Q, length, x.shape[1])


def supports(x: Tensor, g: Tensor, key: Tensor, streams: list[int], probes: int) -> bool:
    return sketches.supports([x, g], probes)


def example(case, dtype, device, generator):
    B, T, d, p = case
    key = example_key(device)
    return (
        randn((B, T, d), dtype, device, generator),
        randn((B, T, p), dtype, device, generator),
        key,
        [7, 1000003],
        LEAST,
    )


FAMILY = Family(
    name="hutchpp_sqnorm",
    schema="(Tensor x, Tensor g, Tensor key, int[] streams, int probes) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=PROJECT.template,
    cases=((3, 5, 17, 9), (2, 130, 63, 65), (1, 1, 1, 1), (2, 33, 129, 1), (0, 4, 3, 2), (2, 0, 3, 2)),  # B, T, d, p
    example=example,
    supports=supports,
)
