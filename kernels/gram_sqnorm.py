"""Squared norms of per-sample weight gradients, by pairs of tokens. Nothing of size d x p or T x T is stored.

    out[b] = sum_l |x_b^T g_lb|_F^2 + bias_l |sum_t g_lbt|^2       x [B, T, d], gs a list of [B, T, p_l] -> [B]

`gram_sqnorms` for one x: of a linear, or of several that are fed by the same x (q, k, v).
"""

from collections.abc import Callable

from torch import Tensor

from flashdp_compile.kernels import gram_sqnorms
from flashdp_compile.kernels.common import accumulator, randn
from flashdp_compile.kernels.family import Family


def reference(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Tensor:
    return gram_sqnorms.reference([x], gs, bias)[0]


def fake(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, *gs))


def specialise(x: Tensor, gs: list[Tensor], bias: list[bool]) -> gram_sqnorms.Spec:
    return gram_sqnorms.specialise([x], gs, bias)


def launch(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Tensor:
    return gram_sqnorms.launch([x], gs, bias).squeeze(0)


def prepare(x: Tensor, gs: list[Tensor], bias: list[bool]) -> Callable[..., Tensor]:
    norms = gram_sqnorms.prepare([x], gs, bias)
    return lambda x, gs, bias: norms([x], gs, bias).squeeze(0)


def example(case, dtype, device, generator):
    B, T, d, *ps = case
    gs = [randn((B, T, p), dtype, device, generator) for p in ps]
    return randn((B, T, d), dtype, device, generator), gs, [n % 2 == 0 for n in range(len(ps))]


FAMILY = Family(
    name="gram_sqnorm",
    schema="(Tensor x, Tensor[] gs, bool[] bias) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=gram_sqnorms.TEMPLATE,
    # B, T, d, p_0, p_1, ...
    cases=((3, 5, 7, 9), (2, 65, 63, 65, 3), (1, 1, 1, 1), (4, 130, 16, 8, 33, 1), (0, 4, 3, 2), (2, 0, 3, 2)),
    example=example,
    tiled=True,
    stays_op=lambda x, gs, bias: gram_sqnorms.stays_op([x], gs, bias),
    prepare=prepare,
)
