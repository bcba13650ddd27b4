"""Matrix products with bare parameters: matmul, bmm, einsum, mixtures of experts, bilinear forms."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, masked_cross_entropy, regression, several, tagging


@register(equal=True)
def matmul_with_parameter(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(n.width, n.out))),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def matrix_vector_product(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(n.width))), floats(n.time, n.width), (n.time,)
    )


@register(equal=True)
def expanded_weight_in_bmm(n: Sizes) -> Case:
    """bmm with a weight expanded over the batch: the batch is summed after the product, not by it."""
    return regression(
        lambda: Model(
            lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)), w=nn.Parameter(torch.randn(n.width, n.out))
        ),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register(equal=True)
def weight_per_head(n: Sizes) -> Case:
    return regression(
        lambda: Model(
            lambda m, x: torch.einsum("btd,hdk->bhtk", x, m.w), w=nn.Parameter(torch.randn(n.heads, n.width, n.out))
        ),
        floats(n.time, n.width),
        (n.heads, n.time, n.out),
    )


@register(equal=True)
def weight_per_time_step(n: Sizes) -> Case:
    """A matrix for each position: the bmm runs over time and the batch is a row of each product."""
    return regression(
        lambda: Model(
            lambda m, x: torch.einsum("btd,tdk->btk", x, m.w), w=nn.Parameter(torch.randn(n.time, n.width, n.out))
        ),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register(equal=True)
def dense_mixture_of_experts(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.einsum("btd,edo,bte->bto", x, m.experts, m.router(x).softmax(-1))

    return tagging(
        lambda: Model(forward, experts=nn.Parameter(torch.randn(3, n.width, n.vocab)), router=nn.Linear(n.width, 3)),
        floats(n.time, n.width),
        n,
    )


@register()
def top_1_of_two_experts(n: Sizes) -> Case:
    """Every expert runs on every token; which one counts is chosen by the data."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        gate = m.router(x).softmax(-1)
        best, index = gate.max(-1, keepdim=True)
        return best * torch.where(index == 0, m.first(x), m.second(x))

    return regression(
        lambda: Model(
            forward, router=nn.Linear(n.width, 2), first=nn.Linear(n.width, n.out), second=nn.Linear(n.width, n.out)
        ),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def bilinear(n: Sizes) -> Case:
    return regression(lambda: nn.Bilinear(n.width, 5, n.out), several(floats(n.width), floats(5)), (n.out,))


@register(equal=True)
def low_rank_then_classes(n: Sizes) -> Case:
    """A narrow middle, and the loss written with the class axis second."""
    return replace(
        tagging(
            lambda: nn.Sequential(nn.Linear(n.width, 2, bias=False), nn.Linear(2, n.vocab)), floats(n.time, n.width), n
        ),
        loss=masked_cross_entropy,
    )
