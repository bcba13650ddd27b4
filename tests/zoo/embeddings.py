"""Tables looked up by id: padding, repeated ids, positions, and tables that are computed first."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression, several, tagging, tokens


class TokensAndPositions(nn.Module):
    """Token table plus position table, looked up by arange."""

    def __init__(self, vocab: int, time: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(time, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) * self.positions(torch.arange(ids.shape[1], device=ids.device)).tanh()


class PatchesWithClassToken(nn.Module):
    """The front of a vision transformer: [B, T, d] -> [B, T + 1, d], a class token in front, positions added.

    The token is as large as a patch. A norm would blow a token near zero up, and its rounding as well.
    """

    def __init__(self, time: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, time + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions


@register(equal=True)
def embedding(n: Sizes) -> Case:
    return regression(lambda: nn.Embedding(n.vocab, n.width), tokens(n.vocab, n.time), (n.time, n.width))


@register()
def embedding_of_one_id(n: Sizes) -> Case:
    return regression(lambda: nn.Embedding(n.vocab, n.width), tokens(n.vocab), (n.width,))


@register()
def embedding_of_id_grid(n: Sizes) -> Case:
    return regression(lambda: nn.Embedding(n.vocab, n.width), tokens(n.vocab, n.time, 3), (n.time, 3, n.width))


@register("peer", equal=True)
def embedding_with_padding(n: Sizes) -> Case:
    """About half of the ids are padding, whose row must get no gradient and add nothing to the norm."""
    return regression(
        lambda: nn.Embedding(n.vocab, n.width, padding_idx=3),
        lambda size: (torch.randint(0, n.vocab, (size, n.time)).where(torch.rand(size, n.time) < 0.5, 3),),
        (n.time, n.width),
    )


@register("peer", equal=True)
def embedding_of_repeated_ids(n: Sizes) -> Case:
    """Few ids, so that every sample repeats some: a norm that overwrites instead of adding is too small."""
    return regression(lambda: nn.Embedding(n.vocab, n.width), tokens(2, n.time), (n.time, n.width))


@register("peer")
def embedding_of_a_single_repeated_id(n: Sizes) -> Case:
    """All tokens of all samples are the same id: samples meet in one row of the table."""
    return regression(lambda: nn.Embedding(n.vocab, n.width), lambda size: (torch.full((size, 9), 4),), (9, n.width))


@register("peer")
def embedding_of_transposed_ids(n: Sizes) -> Case:
    """The ids are a view that is not contiguous."""
    return regression(
        lambda: nn.Embedding(n.vocab, n.width),
        lambda size: (torch.randint(0, n.vocab, (n.time, size)).T,),
        (n.time, n.width),
    )


@register()
def embedding_then_linear(n: Sizes) -> Case:
    return tagging(
        lambda: nn.Sequential(nn.Embedding(n.vocab, n.width), nn.Linear(n.width, n.vocab)), tokens(n.vocab, n.time), n
    )


@register("peer", equal=True)
def embedding_bag_of_repeated_ids(n: Sizes) -> Case:
    return regression(lambda: nn.EmbeddingBag(n.vocab, n.width, mode="sum"), tokens(2, n.time), (n.width,))


@register()
def embedding_bag_of_means(n: Sizes) -> Case:
    """Padding does not count in the mean."""
    return regression(lambda: nn.EmbeddingBag(n.vocab, n.width, padding_idx=0), tokens(3, n.time), (n.width,))


@register()
def embedding_bag_of_maxima(n: Sizes) -> Case:
    return regression(
        lambda: nn.EmbeddingBag(n.vocab, n.width, mode="max", padding_idx=0), tokens(3, n.time), (n.width,)
    )


@register()
def embedding_bag_with_weights(n: Sizes) -> Case:
    """The weights of the ids belong to the sample as well."""
    return regression(
        lambda: Model(
            lambda m, ids, w: m.bag(ids, per_sample_weights=w), bag=nn.EmbeddingBag(n.vocab, n.width, mode="sum")
        ),
        several(tokens(n.vocab, n.time), floats(n.time)),
        (n.width,),
    )


@register()
def one_hot_times_table(n: Sizes) -> Case:
    return regression(
        lambda: Model(
            lambda m, ids: F.one_hot(ids, n.vocab).to(m.table.dtype) @ m.table,
            table=nn.Parameter(torch.randn(n.vocab, n.width)),
        ),
        tokens(n.vocab, n.time),
        (n.time, n.width),
    )


@register()
def table_that_is_computed(n: Sizes) -> Case:
    """The looked-up table is a product of two parameters: what follows the lookup's gradient is no isometry."""
    return regression(
        lambda: Model(
            lambda m, ids: F.embedding(ids, m.left @ m.right),
            left=nn.Parameter(torch.randn(n.vocab, 3)),
            right=nn.Parameter(torch.randn(3, n.width)),
        ),
        tokens(n.vocab, n.time),
        (n.time, n.width),
    )


@register()
def rows_taken_by_index(n: Sizes) -> Case:
    """`table[ids]` on a bare parameter, without nn.Embedding."""
    return regression(
        lambda: Model(lambda m, ids: m.table[ids], table=nn.Parameter(torch.randn(n.vocab, n.width))),
        tokens(n.vocab, n.time),
        (n.time, n.width),
    )


@register()
def ids_from_buckets(n: Sizes) -> Case:
    """Ids computed from float data inside the model."""
    return regression(
        lambda: Model(
            lambda m, x: m.table(torch.bucketize(x, m.edges)),
            table=nn.Embedding(5, n.width),
            edges=torch.tensor([-1.0, -0.3, 0.3, 1.0]),
        ),
        floats(n.time),
        (n.time, n.width),
    )


@register("peer", equal=True)
def position_table(n: Sizes) -> Case:
    return regression(lambda: TokensAndPositions(n.vocab, n.time, n.width), tokens(n.vocab, n.time), (n.time, n.width))


@register("peer", equal=True)
def class_token_and_positions(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Linear(n.width, n.width), PatchesWithClassToken(n.time, n.width)),
        floats(n.time, n.width),
        (n.time + 1, n.width),
    )


@register(equal=True)
def positions_without_batch_axis(n: Sizes) -> Case:
    """A [T, d] parameter added to [B, T, d]."""
    return regression(
        lambda: Model(
            lambda m, x: m.fc(x + m.positions), positions=nn.Parameter(torch.zeros(n.time, n.width)),
            fc=nn.Linear(n.width, n.out),
        ),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register()
def positions_cut_to_length(n: Sizes) -> Case:
    """The table is longer than the input, so some of its rows get no gradient."""
    return regression(
        lambda: Model(
            lambda m, x: x * m.positions[:, : x.shape[1]], positions=nn.Parameter(torch.randn(1, n.time + 3, n.width))
        ),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register()
def mask_token(n: Sizes) -> Case:
    """Masked tokens are replaced by a parameter; which ones is data."""
    return regression(
        lambda: Model(
            lambda m, x, mask: m.fc(torch.where(mask[..., None], m.token, x)),
            token=nn.Parameter(torch.zeros(n.width)),
            fc=nn.Linear(n.width, n.out),
        ),
        lambda size: (torch.randn(size, n.time, n.width), torch.rand(size, n.time) < 0.5),
        (n.time, n.out),
    )


@register()
def relative_position_bias(n: Sizes) -> Case:
    """Attention scores plus a table indexed by the distance of two tokens, as in T5."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        distance = steps[:, None] - steps[None, :] + n.time - 1
        return (m.q(x) @ x.mT + m.bias(distance).squeeze(-1)).softmax(-1) @ x

    return regression(
        lambda: Model(forward, q=nn.Linear(n.width, n.width), bias=nn.Embedding(2 * n.time - 1, 1)),
        floats(n.time, n.width),
        (n.time, n.width),
    )
