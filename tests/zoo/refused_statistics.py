"""Refused: a statistic of the batch reaches single samples."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.adversarial import SIZE, TIME, WIDTH, refuse, refuse_layer, rows, sequences

BATCH_NORM = ("batchnorm", "batch norm", "batch_norm", "var_mean")

refuse("batch_norm_1d", lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4)), rows, *BATCH_NORM)
refuse(
    "batch_norm_2d",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
    lambda: (torch.randn(SIZE, 2, 5, 5),),
    *BATCH_NORM,
)
refuse(
    "batch_norm_frozen_affine",
    lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=False)),
    rows,
    *BATCH_NORM,
)


@refuse_layer("centred_over_the_batch", rows, "mean", "sum", "sub")
def _(fc, x):
    y = fc(x)
    return y - y.mean(0)


@refuse_layer("inputs_centred_over_the_batch", rows, "mean", "sum", "sub")
def _(fc, x):
    return fc(x - x.mean(0))


@refuse_layer("detached_mean_over_the_batch", rows, "mean", "sum", "sub")
def _(fc, x):
    y = fc(x)
    return y - y.detach().mean(0)


@refuse_layer("divided_by_deviation_over_the_batch", rows, "std", "var")
def _(fc, x):
    y = fc(x)
    return y / y.std(0)


@refuse_layer("divided_by_the_whole_norm", rows, "norm", "sum", "div")
def _(fc, x):
    y = fc(x)
    return y / y.norm()


@refuse_layer("normalized_along_the_batch", rows, "norm", "sum", "div", "expand")
def _(fc, x):
    return F.normalize(fc(x), dim=0)


@refuse_layer("divided_by_the_largest_of_the_batch", rows, "max", "amax")
def _(fc, x):
    y = fc(x)
    return y / y.abs().max()


@refuse_layer("inputs_scaled_by_a_batch_maximum", rows, "max", "amax")
def _(fc, x):
    """As dynamic quantisation does: the scale is taken from the whole tensor."""
    return fc(x / x.abs().amax())


@refuse_layer("minus_the_median_of_the_batch", rows, "median", "sort")
def _(fc, x):
    y = fc(x)
    return y - y.median(0).values


@refuse_layer("clamped_at_a_quantile_of_the_batch", rows, "sort", "lerp", "gather", "index")
def _(fc, x):
    """As Tensor.quantile computes it, which dynamo itself cannot trace on 2.11."""
    y = fc(x)
    ordered, place = y.sort(0).values, 0.5 * (SIZE - 1)
    return torch.minimum(y, torch.lerp(ordered[int(place)], ordered[int(place) + 1], place % 1))


@refuse_layer("clamped_at_the_third_value_of_the_batch", rows, "kthvalue", "sort")
def _(fc, x):
    y = fc(x)
    return torch.minimum(y, y.kthvalue(3, dim=0).values)


if torch.__version__ >= (2, 12):  # aten.equal, called by it on 2.11, stops dynamo before flashdp sees a graph

    @refuse_layer("clamped_at_torch_quantile_of_the_batch", rows, "quantile", "sort", "lerp", "gather", "index")
    def _(fc, x):
        y = fc(x)
        return torch.minimum(y, y.quantile(0.5, dim=0))


@refuse_layer("softmax_over_the_batch", rows, "softmax", "amax")
def _(fc, x):
    return fc(x).softmax(0)


@refuse_layer("softmax_over_the_batch_of_sequences", sequences, "softmax", "amax")
def _(fc, x):
    return fc(x).log_softmax(0)


@refuse_layer("cumsum_over_the_batch", rows, "cumsum")
def _(fc, x):
    return fc(x).cumsum(0)


@refuse_layer(
    "scaled_by_a_count_over_the_batch", lambda: (torch.randn(SIZE, WIDTH), torch.rand(SIZE) < 0.5), "sum", "mul"
)
def _(fc, x, mask):
    """How many samples satisfy a condition: an integer, so no gradient flows, and it still tells of others."""
    return fc(x) * mask.sum()


@refuse_layer("scaled_by_any_over_the_batch", rows, "any", "sum", "max", "where")
def _(fc, x):
    return torch.where((x > 1.5).any(), fc(x), x)


@refuse_layer(
    "divided_by_a_token_count_over_the_batch",
    lambda: (torch.randn(SIZE, TIME, WIDTH), torch.rand(SIZE, TIME) < 0.5),
    "sum",
    "div",
)
def _(fc, x, mask):
    """The per-token losses of the batch over the number of real tokens in it."""
    return (fc(x).square().mean(-1) * mask).sum(1) / mask.sum()
