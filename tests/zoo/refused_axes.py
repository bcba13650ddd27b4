"""Refused: samples multiplied with samples, and views that cut the batch axis."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import map as map_over

from zoo.adversarial import SIZE, TIME, WIDTH, cube, refuse, refuse_layer, rows, sequences, square
from zoo.case import Model


@refuse_layer("contrastive_products", rows, "mm", "matmul", "product")
def _(fc, x):
    y = fc(x)
    return y @ y.T


@refuse_layer(
    "clip_style_logits", lambda: (torch.randn(SIZE, WIDTH), torch.randn(SIZE, WIDTH)), "mm", "matmul", "product"
)
def _(fc, a, b):
    return (fc(a) @ fc(b).T).logsumexp(1)


@refuse_layer("two_views_then_contrast", rows, "mm", "matmul", "product", "cat")
def _(fc, x):
    """SimCLR: two views stacked along the batch, then all pairs."""
    y = F.normalize(fc(torch.cat([x, x.tanh()], 0)), dim=-1)
    return (y @ y.T).logsumexp(1)


@refuse_layer("plus_its_transpose", square, "transpose", "permute", "add", "axes", "axis")
def _(fc, x):
    """At B = d the shapes agree: sample i meets feature i of every other sample."""
    y = fc(x)
    return y + y.T


@refuse_layer("outer_products_over_the_batch", cube, "bmm", "product", "axes", "axis")
def _(fc, x):
    return torch.bmm(fc(x).transpose(0, 2), x.transpose(0, 2))


@refuse_layer("attention_over_the_batch", cube, "attends", "a product over the batch")
def _(fc, x):
    y = fc(x).transpose(0, 1)
    return F.scaled_dot_product_attention(y, y, y)


@refuse_layer("attention_mask_without_a_batch_dimension", lambda: (*cube(), torch.rand(SIZE, SIZE) < 0.7), "its mask")
def _(fc, x, padding):
    """[B, T] is broadcast as [T, T]: the row of sample b hides from token b of every sample what b's padding is."""
    y = fc(x)[:, None]
    return F.scaled_dot_product_attention(y, y, y, attn_mask=padding)


@refuse_layer("attention_over_the_batch_2d", rows, "attention", "mm", "product", "softmax")
def _(fc, x):
    """[B, d] taken as one sequence of B tokens."""
    y = fc(x)
    return (y @ y.T).softmax(-1) @ y


@refuse_layer("covariance_of_the_batch", rows, "mm", "matmul", "product", "sum", "mean")
def _(fc, x):
    """Decorrelation as in Barlow twins: a [d, d] matrix summed over samples, then squared."""
    y = fc(x)
    return (y.T @ y).square().sum()


@refuse_layer("distances_between_samples", rows, "cdist", "sub", "axes", "axis", "mm")
def _(fc, x):
    y = fc(x)
    return (y[:, None] - y[None]).square().sum(-1)


@refuse_layer("convolution_over_the_batch", rows, "convolution", "conv")
def _(fc, x):
    """The samples as the steps of one sequence."""
    return F.conv1d(fc(x).T[None], x.new_ones(1, WIDTH, 3), padding=1)[0]


@refuse_layer("one_half_of_the_batch_gates_the_other", rows, "glu")
def _(fc, x):
    return F.glu(fc(x), 0)


@refuse_layer("padded_over_the_batch", rows, "index", "batch")
def _(fc, x):
    """Copies of the first and the last sample stand at the ends of the batch."""
    return F.avg_pool1d(F.pad(fc(x).T[None], (1, 1), mode="replicate"), 3, 1)[0].T


@refuse_layer("interpolated_over_the_batch", rows, "pool", "upsample", "mean", "view", "squeeze")
def _(fc, x):
    return F.avg_pool1d(fc(x).T[None], 2)[0]


@refuse_layer("recurrence_over_the_batch", rows, "unbind", "select", "slice", "split", "index")
def _(fc, x):
    """Each sample's state starts where the sample before it ended."""
    states = [fc(x[0])]
    for i in range(1, SIZE):
        states.append(fc(x[i] + states[-1].tanh()))
    return torch.stack(states)


refuse(
    "experts_on_the_batch_axis",
    lambda: Model(lambda m, x: torch.bmm(x, m.experts), experts=nn.Parameter(torch.randn(SIZE, WIDTH, 3))),
    sequences,
    *("batch", "bmm", "expert"),
    mixes=False,
)
refuse(
    "parameter_with_a_row_per_sample",
    lambda: Model(lambda m, x: x * m.scale, scale=nn.Parameter(torch.randn(SIZE, 1))),
    rows,
    *("batch", "mul"),
    mixes=False,
)
refuse(
    "positions_on_the_batch_axis",
    lambda: Model(
        lambda m, x: m.fc(x) + m.positions(torch.arange(x.shape[0], device=x.device)),
        fc=nn.Linear(WIDTH, WIDTH),
        positions=nn.Embedding(SIZE, WIDTH),
    ),
    rows,
    *("batch", "embedding", "iota", "arange", "add"),
    mixes=False,
)
refuse(
    "embedding_scaled_by_frequency",
    lambda: nn.Embedding(7, WIDTH, scale_grad_by_freq=True),
    lambda: (torch.randint(0, 3, (SIZE, TIME)),),
    *("scale_grad_by_freq", "freq", "count", "embedding", "index_put"),
)
refuse(
    "group_norm_with_samples_as_channels",
    lambda: Model(lambda m, x: m.norm(m.fc(x)[None]), fc=nn.Linear(WIDTH, WIDTH), norm=nn.GroupNorm(2, SIZE)),
    rows,
    *("var_mean", "norm", "batch", "view", "mean"),
)


@refuse_layer("time_and_batch_swapped_by_view", sequences, "view", "reshape", "cut")
def _(fc, x):
    """[B, T, d] read as [T, B, d] without a transpose, then averaged over what is not time."""
    return fc(x).view(TIME, SIZE, WIDTH).tanh().mean(0)


@refuse_layer("two_samples_as_one_sequence", sequences, "view", "reshape", "cut")
def _(fc, x):
    """Packing: pairs of samples become one long sequence, whose tokens are averaged."""
    return fc(x).reshape(SIZE // 2, 2 * TIME, WIDTH).tanh().mean(1)


@refuse_layer("samples_as_features", rows, "view", "reshape", "cut", "permute", "transpose", "mm", "axis")
def _(fc, x):
    return fc(fc(x).T.reshape(SIZE, WIDTH))


@refuse_layer("batch_folded_into_features", square, "view", "reshape", "cut", "mm", "layer_norm", "var_mean", "mean")
def _(fc, x):
    return F.layer_norm(fc(x).reshape(1, -1), [SIZE * SIZE])


@refuse_layer("tokens_of_the_batch_flattened_and_pooled", sequences, "view", "reshape", "cut", "slice", "unflatten")
def _(fc, x):
    """Windows of three tokens on a time axis of four: every other window spans two samples."""
    return fc(x).reshape(-1, 3, WIDTH).tanh().mean(1)


@refuse_layer("linear_system_over_the_batch", cube, "matrices", "batch")
def _(fc, x):
    """One system for each token, whose unknowns are the samples."""
    y = fc(x).transpose(0, 1)
    return torch.linalg.solve_ex(y @ y.mT + torch.eye(SIZE).to(x), y).result.transpose(0, 1)


@refuse_layer("eigenvalues_of_the_products_of_samples", square, "mm", "product", "matrices")
def _(fc, x):
    y = fc(x)
    return torch.linalg.eigvalsh(y + y.mT)


class Bags(nn.Module):
    """EmbeddingBag over the ids of all samples, in bags of `length` that are moved back by `shift`."""

    def __init__(self, length: int, shift: int) -> None:
        super().__init__()
        self.length, self.shift, self.bag = length, shift, nn.EmbeddingBag(9, WIDTH, mode="sum")

    def forward(self, ids):
        flat = ids.flatten()
        starts = torch.arange(0, len(flat), self.length)
        starts = (starts - self.shift).clamp(min=0) if self.shift else starts
        return self.bag(flat, starts).view(ids.shape[0], -1)


def ids() -> tuple[torch.Tensor]:
    return (torch.randint(0, 9, (SIZE, TIME)),)


refuse("bags_that_begin_in_the_sample_before", lambda: Bags(TIME, 1), ids, "bag")
refuse("bags_that_end_within_samples", lambda: Bags(2, 0), ids, "bag", mixes=False)


@refuse_layer("distances_among_samples", rows, "places", "product", "axes", "axis")
def _(fc, x):
    return torch.cdist(fc(x), x).sum(1)


@refuse_layer("boundaries_that_are_samples", rows, "searches along the batch")
def _(fc, x):
    """What an element is worth depends on its rank among those of all samples."""
    y = fc(x)
    ranks = torch.searchsorted(x[:, 0].contiguous(), y.detach())
    return (y * ranks).sum(1)


@refuse_layer("constants_among_boundaries_that_are_samples", rows, "searches along the batch")
def _(fc, x):
    ranks = torch.searchsorted(x[:, 0].contiguous(), torch.arange(3.0).view(1, 1, 3))
    return fc(x).sum(1) * ranks.sum()


@refuse_layer(
    "images_read_at_another_samples_places", lambda: (torch.randn(SIZE, 2, SIZE, 2),), "indexes along the batch"
)
def _(fc, x):
    """The grid of a sample reads a slice of all images."""
    grid = fc(x).transpose(1, 2)
    return F.grid_sample(x.transpose(0, 2), grid, align_corners=False).sum((1, 2, 3))


@refuse_layer("mapped_over_samples_one_by_one", rows, "select", "axis", "sample")
def _(fc, x):
    """A loop over the samples, each of which sees the sum of all."""
    return map_over(lambda row, every: fc(row).sum() * every, x, x.sum())


@refuse_layer("loop_of_too_many_steps", sequences, "map_impl")
def _(fc, x):
    """It would not mix samples; unrolled, it would compile for hours. Here it does mix them."""
    many = x.sum(0).repeat(300, 1)[:300]
    return fc(x).sum((1, 2)) * map_over(lambda row: fc(row).sum(), many).sum()
