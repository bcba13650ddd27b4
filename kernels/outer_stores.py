"""Per-sample weight gradients of several layers, stored in the activations' dtype, and the squared norms of what was
stored, in one launch.

    product_i[b] = round(x_ib^T g_ib), out[i, b] = |product_i[b]|_F^2        x_i [B, T, d_i], g_i [B, T, p_i]

`stores` has a number for each layer. Products of one number, which have one shape, are one tensor [layers, B, d, p], in
the order of the layers; these tensors are followed by out [layers, B]. As outer_store does for one layer, whose last
round of programs leaves part of a device idle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels import hopper, outer_sqnorm, outer_store, several, weighted_matmuls
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, dot_type
from flashdp_compile.kernels.family import Family, supported
from flashdp_compile.kernels.hopper import outer_stores as warp_specialised
from flashdp_compile.kernels.tuning import Tiles


def places(stores: Sequence[int]) -> list[tuple[int, int]]:
    """Where each layer's products are: in which tensor, and at which place there."""
    return [(store, list(stores[:number]).count(store)) for number, store in enumerate(stores)]


def empty(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> list[Tensor]:
    """Memory for the products."""
    first = [stores.index(store) for store in range(1 + max(stores))]
    return [
        xs[n].new_empty((stores.count(store), xs[n].shape[0], xs[n].shape[2], gs[n].shape[2]))
        for store, n in enumerate(first)
    ]


def reference(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> list[Tensor]:
    products, norms = empty(xs, gs, stores), []
    for x, g, (store, place) in zip(xs, gs, places(stores), strict=True):
        product, norm = outer_store.reference(x, g)
        products[store][place] = product
        norms.append(norm)
    return [*products, torch.stack(norms)]


def fake(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> list[Tensor]:
    return [*empty(xs, gs, stores), xs[0].new_empty((len(xs), xs[0].shape[0]), dtype=accumulator(*xs, *gs))]


@dataclass(frozen=True)
class Spec:
    dot_type: str
    tiles: Tiles
    kinds: tuple[int, ...]  # how many layers are of each
    stores: int  # how many tensors of products
    tail: int  # see hopper.tail


def specialise(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> Spec:
    kinds = tuple(map(len, several.kinds(xs, gs)))
    return Spec(dot_type(xs[0], gs[0]), hopper.STORED, kinds, 1 + max(stores), hopper.tail(x.shape[1] for x in xs))


def launch(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> list[Tensor]:
    if stays_op(xs, gs, stores):
        return prepare(xs, gs, stores)(xs, gs, stores)
    products, norms = empty(xs, gs, stores), []
    for x, g, (store, place) in zip(xs, gs, places(stores), strict=True):
        norms.append(outer_sqnorm.run(outer_store.FAMILY, outer_store.specialise(x, g), x, g, products[store][place]))
    return [*products, torch.stack(norms)]


def prepare(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> Callable[..., list[Tensor]]:
    return warp_specialised.prepare(kernel(FAMILY, specialise(xs, gs, stores)), xs, gs, places(stores), empty)


def stays_op(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> bool:
    """Whether the kernel in Gluon applies: descriptors store rows of whole 16 bytes."""
    return hopper.fits(list(zip(xs, gs, strict=True))) and all(g.shape[2] % 8 == 0 for g in gs)


def supports(xs: list[Tensor], gs: list[Tensor], stores: Sequence[int]) -> bool:
    return supported(*xs, *gs) and len({x.shape[0] for x in xs}) == 1 and len({x.dtype for x in xs}) == 1


def example(case, dtype, device, generator):
    xs, gs, *_ = weighted_matmuls.example(case, dtype, device, generator)
    shapes = list(zip(case[2::2], case[3::2], strict=True))
    distinct = list(dict.fromkeys(shapes))
    return xs, gs, [distinct.index(shape) for shape in shapes]


FAMILY = Family(
    name="outer_stores",
    schema="(Tensor[] xs, Tensor[] gs, int[] stores) -> Tensor[]",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=warp_specialised.TEMPLATE,
    cases=weighted_matmuls.FAMILY.cases,
    example=example,
    supports=supports,
    stays_op=stays_op,
    prepare=prepare,
)
