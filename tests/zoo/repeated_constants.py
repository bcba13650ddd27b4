"""Constants with an element for each sample: ids, masks, images and factors that are the same for all and expanded.

A sample's gradient must see its own element of them, not all: else it comes out B times too large.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression


def beside_linear(n: Sizes, constant: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> Case:
    """fc(x) plus what `constant` makes for every sample alike, [B, T, out]."""
    return regression(
        lambda: Model(lambda m, x: m.fc(x) + constant(m, x), fc=nn.Linear(n.width, n.out), **make(parts)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


def make(parts: dict[str, object]) -> dict[str, object]:
    """Parts are made anew for each model."""
    return {name: part() for name, part in parts.items()}  # type: ignore[operator]


def expanded(x: Tensor, ids: Tensor) -> Tensor:
    return ids.expand(len(x), -1)


@register("peer", equal=True)
def token_types_of_zero(n: Sizes) -> Case:
    """Ids made of zeros for every batch: BERT's token types."""
    return beside_linear(
        n,
        lambda m, x: m.types(torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)),
        types=lambda: nn.Embedding(2, n.out),
    )


@register("peer", equal=True)
def positions_expanded_over_the_batch(n: Sizes) -> Case:
    return beside_linear(
        n,
        lambda m, x: m.positions(expanded(x, torch.arange(x.shape[1], device=x.device))).tanh(),
        positions=lambda: nn.Embedding(n.time + 1, n.out),
    )


@register("peer")
def positions_with_padding(n: Sizes) -> Case:
    """OPT and RoBERTa count from an offset, and one row is padding."""
    return beside_linear(
        n,
        lambda m, x: m.positions(expanded(x, torch.arange(x.shape[1], device=x.device))),
        positions=lambda: nn.Embedding(n.time + 1, n.out, padding_idx=1),
    )


@register("peer")
def token_types_gathered_from_a_buffer(n: Sizes) -> Case:
    def constant(m: nn.Module, x: Tensor) -> Tensor:
        places = expanded(x, torch.arange(x.shape[1], device=x.device))
        return m.types(m.ids.expand(len(x), -1).gather(1, places))

    return beside_linear(
        n,
        constant,
        types=lambda: nn.Embedding(3, n.out),
        ids=lambda: torch.arange(n.time + 2)[None] % 3,
    )


@register("peer", equal=True)
def rows_of_a_parameter(n: Sizes) -> Case:
    """Advanced indexing with expanded ids."""
    return beside_linear(
        n,
        lambda m, x: m.table[expanded(x, torch.arange(x.shape[1], device=x.device) % 2)].sigmoid(),
        table=lambda: nn.Parameter(torch.randn(3, n.out)),
    )


@register("peer")
def elements_of_a_parameter(n: Sizes) -> Case:
    """Two indices, one of them for every sample."""

    def constant(m: nn.Module, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1], device=x.device)[None, :, None].expand(len(x), -1, n.out)
        return m.table[rows % 2, torch.arange(n.out, device=x.device)]

    return beside_linear(n, constant, table=lambda: nn.Parameter(torch.randn(2, n.out)))


@register("peer", equal=True)
def linear_of_a_constant(n: Sizes) -> Case:
    """The input of a layer is a buffer, expanded over the batch."""
    return beside_linear(
        n,
        lambda m, x: m.other(m.seed.expand(len(x), -1, -1)).tanh(),
        other=lambda: nn.Linear(3, n.out),
        seed=lambda: torch.linspace(-1, 1, 3 * n.time).reshape(1, n.time, 3),
    )


def beside_filtered(n: Sizes, filters: type[nn.Module]) -> Case:
    """A buffer [1, 3, T] that is filtered for each sample."""
    return beside_linear(
        n,
        lambda m, x: m.filters(m.seed.expand(len(x), -1, -1)).mT * 0.1,
        filters=lambda: filters(3, n.out, 3, padding=1),
        seed=lambda: torch.linspace(-1, 1, 3 * n.time).reshape(1, 3, n.time),
    )


@register("peer")
def convolution_of_a_constant(n: Sizes) -> Case:
    return beside_filtered(n, nn.Conv1d)


@register("peer")
def transposed_convolution_of_a_constant(n: Sizes) -> Case:
    return beside_filtered(n, nn.ConvTranspose1d)


@register("peer")
def bilinear_with_a_constant(n: Sizes) -> Case:
    return beside_linear(
        n,
        lambda m, x: m.form(x, m.seed.expand(len(x), -1, -1)),
        form=lambda: nn.Bilinear(n.width, 3, n.out),
        seed=lambda: torch.linspace(-1, 1, 3 * n.time).reshape(1, n.time, 3),
    )


@register("peer", equal=True)
def scale_of_a_constant(n: Sizes) -> Case:
    """The gradient of a factor is summed over a product of samples with an expanded buffer."""
    return beside_linear(
        n,
        lambda m, x: m.scale * m.seed.expand(len(x), -1, -1),
        scale=lambda: nn.Parameter(torch.randn(n.out)),
        seed=lambda: torch.linspace(-1, 1, n.out * n.time).reshape(1, n.time, n.out),
    )


def beside_transformed(n: Sizes, width: int, layer: Callable[[], nn.Module]) -> Case:
    """A buffer [1, T, width] that a layer transforms for each sample."""
    return beside_linear(
        n,
        lambda m, x: m.layer(m.seed.expand(len(x), -1, -1)),
        layer=layer,
        seed=lambda: torch.linspace(-1, 2, width * n.time).square().reshape(1, n.time, width),
    )


@register("peer", equal=True)
def layer_norm_of_a_constant(n: Sizes) -> Case:
    return beside_transformed(n, n.out, lambda: nn.LayerNorm(n.out))


@register("peer")
def group_norm_of_a_constant(n: Sizes) -> Case:
    return beside_transformed(n, n.out, lambda: nn.GroupNorm(2, n.time))


@register("peer")
def gated_linear_unit_of_a_constant(n: Sizes) -> Case:
    return beside_transformed(n, 3, lambda: nn.Sequential(nn.Linear(3, 2 * n.out), nn.GLU()))


@register("peer")
def memory_of_attention(n: Sizes) -> Case:
    """Queries of samples, keys and values from a buffer that is projected for each sample."""

    def constant(m: nn.Module, x: Tensor) -> Tensor:
        memory = m.seed.expand(len(x), -1, -1)
        return F.scaled_dot_product_attention(m.query(x), m.key(memory), m.value(memory))

    return beside_linear(
        n,
        constant,
        query=lambda: nn.Linear(n.width, 3),
        key=lambda: nn.Linear(3, 3),
        value=lambda: nn.Linear(3, n.out),
        seed=lambda: torch.linspace(-1, 1, 15).reshape(1, 5, 3),
    )
