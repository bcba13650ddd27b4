"""Cross term of the norm of a table that is used twice, as embedding and as output head.

    out[b] = sum_{t,s} gl[b, s, ids_bt] (ge_bt . x_bs) = <gradient through the embedding, gradient through the head>

ids [B, T] int64, ge [B, T, d] gradient of the embedding's output, x [B, S, d] input of the head, gl [B, S, V]
gradient of the logits -> [B]. The squared norm of the sum of both uses is theirs plus twice this. Nothing of size V x
d is formed. Positions with a negative id are excluded and their ge is not read; other ids must be below V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, dot_type, inner, pointer, randn, random_ids, start, widen
from flashdp_compile.kernels.family import Family


def reference(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor) -> Tensor:
    ge, x, gl = widen(ge, x, gl)
    columns = ids.clamp_min(0)[:, None, :].expand(-1, gl.shape[1], -1)
    terms = gl.gather(2, columns) * (x @ ge.mT)  # [B, S, T]
    return torch.where(ids[:, None, :] >= 0, terms, 0).sum((1, 2))


def fake(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(ge, x, gl))


@dataclass(frozen=True)
class Spec:
    dot_type: str
    ge_inner: bool
    x_inner: bool
    gl_inner: bool
    block_t: int = 64
    block_s: int = 64
    block_k: int = 32


def specialise(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor) -> Spec:
    return Spec(dot_type(ge, x), inner(ge), inner(x), inner(gl))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(
    ids_ptr, ids_s0, ids_s1,
    {{ args("ge", 3, ge_inner) }},
    {{ args("x", 3, x_inner) }},
    {{ args("gl", 3, gl_inner) }},
    part_ptr, T, S, D, V, TILES, TILES_S,
):
    b = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    t = (tile // TILES_S) * {{ block_t }} + tl.arange(0, {{ block_t }})
    s = (tile % TILES_S) * {{ block_s }} + tl.arange(0, {{ block_s }})
    ids = tl.load(ids_ptr + b * ids_s0 + t.to(tl.int64) * ids_s1, mask=t < T, other=-1)
    used = (ids >= 0) & (ids < V)
    acc = tl.zeros([{{ block_t }}, {{ block_s }}], tl.float32)
    for first in range(0, D, {{ block_k }}):
        k = first + tl.arange(0, {{ block_k }})
        inside_t, inside_s = used[:, None] & (k[None, :] < D), (s[:, None] < S) & (k[None, :] < D)
        b_ge = tl.load({{ at("ge", "b", "t[:, None]", "k[None, :]", ge_inner) }}, mask=inside_t, other=0.0)
        b_x = tl.load({{ at("x", "b", "s[:, None]", "k[None, :]", x_inner) }}, mask=inside_s, other=0.0)
        acc = {{ dot("b_ge.to(%s)" % dot_type, "tl.trans(b_x.to(%s))" % dot_type, "acc") }}
    inside = used[:, None] & (s[None, :] < S)
    b_gl = tl.load({{ at("gl", "b", "s[None, :]", "ids[:, None]", gl_inner) }}, mask=inside, other=0.0)
    tl.store(part_ptr + b * TILES + tile, tl.sum(tl.where(inside, acc * b_gl.to(tl.float32), 0.0)))
"""


def launch(ids: Tensor, ge: Tensor, x: Tensor, gl: Tensor) -> Tensor:
    (B, T, D), (_, S, V) = ge.shape, gl.shape
    spec = specialise(ids, ge, x, gl)
    tiles_s = cdiv(S, spec.block_s)
    tiles = cdiv(T, spec.block_t) * tiles_s
    part = x.new_empty((B, tiles), dtype=torch.float32)
    operands = (ids, *ids.stride(), *pointer(ge), *pointer(x), *pointer(gl))
    start(kernel(FAMILY, spec), B * tiles, x, *operands, part, T, S, D, V, tiles, tiles_s)
    return part.sum(1)


def example(case, dtype, device, generator):
    B, T, S, d, V = case
    ids = random_ids((B, T), V, device, generator)
    return ids, *(randn(shape, dtype, device, generator) for shape in ((B, T, d), (B, S, d), (B, S, V)))


FAMILY = Family(
    name="tied_cross",
    schema="(Tensor ids, Tensor ge, Tensor x, Tensor gl) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    # B, T, S, d, V
    cases=((3, 5, 5, 7, 9), (2, 65, 63, 33, 65), (1, 1, 1, 1, 1), (2, 3, 66, 1, 7), (0, 4, 4, 3, 2), (2, 0, 3, 4, 2)),
    example=example,
)
