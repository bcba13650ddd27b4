"""Refused: one sample is read at the place of another, or treated by its own place in the batch."""

import torch
from torch import nn

from zoo.adversarial import SIZE, WIDTH, refuse, refuse_layer, rows, sequences
from zoo.case import Model


@refuse_layer("flip_over_the_batch", rows, "flip", "rev")
def _(fc, x):
    y = fc(x)
    return y * y.flip(0)


@refuse_layer("inputs_flipped_over_the_batch", rows, "flip", "rev")
def _(fc, x):
    return fc(x + x.flip(0))


@refuse_layer("roll_over_the_batch", rows, "roll", "index", "cat", "slice")
def _(fc, x):
    y = fc(x)
    return y + y.roll(1, 0)


@refuse_layer("flattened_roll", sequences, "roll", "index", "cat", "slice")
def _(fc, x):
    """`roll` without a dimension runs through the whole tensor: the last token of a sample enters the next."""
    y = fc(x)
    return y * y.roll(1)


@refuse_layer("shifted_by_one_sample", rows, "cat", "slice")
def _(fc, x):
    y = fc(x)
    return y * torch.cat([y[1:], y[:1]], 0)


@refuse_layer("fixed_permutation_of_the_batch", rows, "index", "gather")
def _(fc, x):
    y = fc(x)
    return y * y[[1, 0, 3, 2, 5, 4]]


@refuse_layer("random_permutation_of_the_batch", rows, "randperm", "index")
def _(fc, x):
    return fc(x)[torch.randperm(x.shape[0], device=x.device)]


@refuse_layer("mixup_by_flip", rows, "flip", "rev")
def _(fc, x):
    return fc(0.7 * x + 0.3 * x.flip(0))


@refuse_layer("mixup_by_permutation", rows, "index", "randperm")
def _(fc, x):
    return fc(0.7 * x + 0.3 * x[torch.randperm(x.shape[0], device=x.device)])


@refuse_layer("first_sample_added_to_all", rows, "select", "slice", "index")
def _(fc, x):
    return fc(x + x[0])


@refuse_layer("every_other_sample", rows, "slice", mixes=False)
def _(fc, x):
    return fc(x[::2])


@refuse_layer("half_of_the_batch_against_the_other", rows, "slice", "split", "view", "sub")
def _(fc, x):
    first, second = fc(x).chunk(2, 0)
    return first * second


@refuse_layer("rows_chosen_by_data", lambda: (torch.randn(SIZE, WIDTH), torch.randint(0, SIZE, (SIZE,))), "index")
def _(fc, x, ids):
    """Ids that are data of one sample say which sample to read."""
    return fc(x)[ids]


@refuse_layer(
    "gather_along_the_batch", lambda: (torch.randn(SIZE, WIDTH), torch.randint(0, SIZE, (SIZE, WIDTH))), "gather"
)
def _(fc, x, index):
    return fc(x).gather(0, index)


@refuse_layer(
    "scatter_along_the_batch", lambda: (torch.randn(SIZE, WIDTH), torch.randint(0, SIZE, (SIZE, WIDTH))), "scatter"
)
def _(fc, x, index):
    y = fc(x)
    return torch.zeros_like(y).scatter_add(0, index, y).tanh()


@refuse_layer("index_add_along_the_batch", lambda: (torch.randn(SIZE, WIDTH), torch.randint(0, SIZE, (SIZE,))), "index")
def _(fc, x, ids):
    """Message passing: samples are nodes of a graph."""
    y = fc(x)
    return torch.zeros_like(y).index_add(0, ids, y).tanh()


@refuse_layer("sorted_over_the_batch", rows, "sort")
def _(fc, x):
    return fc(x).sort(0).values


@refuse_layer("topk_over_the_batch", rows, "topk")
def _(fc, x):
    return fc(x).topk(3, dim=0).values


@refuse_layer("hardest_samples_only", rows, "topk", "sort")
def _(fc, x):
    """Online hard example mining: the loss of the three worst samples."""
    return fc(x).square().sum(1).topk(3).values.sum()


@refuse_layer(
    "masked_by_another_sample",
    lambda: (torch.randn(SIZE, WIDTH), torch.rand(SIZE, 1) < 0.5),
    *("roll", "index", "cat", "slice"),
)
def _(fc, x, mask):
    return fc(x) * mask.roll(1, 0)


@refuse_layer("compared_with_neighbours", rows, "slice", "diff", "cat")
def _(fc, x):
    y = fc(x)
    return torch.diff(y, dim=0).square().sum()


@refuse_layer("weights_by_place", rows, "depends on its place", mixes=False)
def _(fc, x):
    """Removing the first sample would move all others to other weights."""
    return fc(x) * torch.arange(1, x.shape[0] + 1, device=x.device)[:, None]


@refuse_layer("losses_weighted_by_place", rows, "depends on its place", mixes=False)
def _(fc, x):
    return (fc(x).square().sum(1) * torch.linspace(0, 1, x.shape[0], device=x.device)).sum()


@refuse_layer("every_other_sample_masked", sequences, "depends on its place", mixes=False)
def _(fc, x):
    return fc(x).masked_fill((torch.arange(x.shape[0], device=x.device) % 2 == 0)[:, None, None], 0.0)


@refuse_layer("a_token_chosen_by_place", sequences, "depends on its place", mixes=False)
def _(fc, x):
    places = torch.arange(x.shape[0], device=x.device)
    return fc(x)[places, places % x.shape[1]]


@refuse_layer("random_subset_of_fixed_size", rows, "in different places", mixes=False)
def _(fc, x):
    """Three samples are kept, so that whether one is depends on how many others there are."""
    draw = torch.rand(x.shape[0], device=x.device)
    rank = (draw[:, None] > draw[None, :]).sum(1)
    return fc(x) * (rank < 3)[:, None]


@refuse_layer("random_weights_that_add_up_to_one", rows, "from the whole batch", mixes=False)
def _(fc, x):
    """Bayesian bootstrap: each weight is a share of what all samples drew."""
    draw = torch.rand(x.shape[0], 1, device=x.device)
    return fc(x) * (draw / draw.sum())


refuse(
    "a_buffer_with_one_row_per_place",
    lambda: Model(lambda m, x: m.fc(x) + m.offsets, fc=nn.Linear(WIDTH, WIDTH), offsets=torch.randn(SIZE, WIDTH)),
    rows,
    "depends on its place",
    mixes=False,
)


@refuse_layer("constants_put_where_a_mask_differs_by_place", rows, "mask", "counts", mixes=False)
def _(fc, x):
    y, places = fc(x), torch.arange(x.shape[0], device=x.device)
    put = torch.ops.aten._unsafe_masked_index_put_accumulate
    return put(y, places % 2 == 0, [places, torch.zeros_like(places)], y.new_full((x.shape[0],), 10.0)).square()


@refuse_layer("constants_put_at_own_places_where_a_mask_differs", rows, "mask", "counts", mixes=False)
def _(fc, x):
    y, places = fc(x), torch.arange(x.shape[0], device=x.device)
    put = torch.ops.aten._unsafe_masked_index_put_accumulate
    return put(y, places % 2 == 0, [places, (x[:, 0] > 0).long()], y.new_full((x.shape[0],), 10.0)).square()


@refuse_layer("rows_of_a_table_whose_rows_differ", sequences, "index", "mul", "depends on its place", mixes=False)
def _(fc, x):
    y = fc(x)
    rows, times = (torch.arange(size, device=x.device) for size in y.shape[:2])
    table = rows[:, None] * times
    return y * table[rows[:, None], times][..., None]
