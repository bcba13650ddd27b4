"""Squared norms of the gradients of a table that is embedding and output head, estimated by Gaussian probes.

    out[b] = |sum_s x_bs (gl_bs P) + sum_t ge_bt P[ids_bt]|_F^2

ids [B, T] int64, ge [B, T, d] gradient of the embedding's output, x [B, S, d] input of the head, gl [B, S, V] gradient
of the logits, P [V, probes] -> [B]. Both parts of the gradient meet the same probes and are added up before they are
squared: an unbiased estimate of the squared norm of their sum, with the distribution that sketch_sqnorm.py states.
Positions with a negative id are excluded and their ge is not read; other ids must be below V.
"""

import torch
from torch import Tensor

from flashdp_compile.kernels import sketches
from flashdp_compile.kernels.common import accumulator, example_key, randn, random_ids, widen
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.probes import LEAST, probe_matrix
from flashdp_compile.kernels.sketches import PROJECT, Projection, draw, estimate, lengths, project, projection, sketch


def reference(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor, key: Tensor, stream: int, probes: int) -> Tensor:
    ge, x, gl = widen(ge, x, gl)
    P = probe_matrix(key, stream, gl.shape[2], probes, x.dtype)
    used = (ids >= 0)[..., None]
    rows = torch.where(used, P[ids.clamp_min(0)], 0)
    ge = torch.where(used, ge, 0)
    h = gl @ P
    length = lengths(x) * lengths(h) + lengths(ge) * lengths(rows)
    return estimate(x.mT @ h + ge.mT @ rows, length, ids.shape[1] + x.shape[1])


def fake(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor, key: Tensor, stream: int, probes: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(ge, x, gl))


def specialise(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor, key: Tensor, stream: int, probes: int) -> Projection:
    return projection([gl], probes)


def launch(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor, key: Tensor, stream: int, probes: int) -> Tensor:
    if 0 in (*ids.shape, *ge.shape, *x.shape, *gl.shape):
        return reference(ids, ge, x, gl, key, stream, probes)
    P = draw(key, stream, gl.shape[2], probes)
    h, of_h = project([gl], [P])
    y, of_x = sketch(x, h)
    used = (ids >= 0)[..., None]
    rows = torch.where(used, P[0][ids.clamp_min(0)], 0)
    embedded, of_ge = sketch(torch.where(used, ge, 0), rows)
    of_rows = rows.unflatten(2, (2, probes)).sum(2, dtype=torch.float32).square().sum((1, 2))
    length = (of_h.sum(1) * of_x.sum(1)).sqrt() + (of_ge.sum(1) * of_rows).sqrt()
    return estimate(y + embedded, length, ids.shape[1] + x.shape[1])


def supports(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor, key: Tensor, stream: int, probes: int) -> bool:
    return sketches.supports([ge, x, gl], probes)


def example(case, dtype, device, generator):
    B, T, S, d, V = case
    ids = random_ids((B, T), V, device, generator)
    operands = [randn(shape, dtype, device, generator) for shape in ((B, T, d), (B, S, d), (B, S, V))]
    return ids, *operands, example_key(device), 7, LEAST


FAMILY = Family(
    name="tied_sketch_sqnorm",
    schema="(Tensor ids, Tensor ge, Tensor x, Tensor gl, Tensor key, int stream, int probes) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=PROJECT.template,
    # B, T, S, d, V
    cases=((3, 5, 5, 7, 9), (2, 65, 63, 33, 65), (1, 1, 1, 1, 1), (2, 3, 66, 1, 7), (0, 4, 4, 3, 2), (2, 0, 3, 4, 2)),
    example=example,
    supports=supports,
)
