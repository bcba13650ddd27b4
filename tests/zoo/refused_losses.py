"""Refused: scalar losses that are no sum over samples, and data of the batch left in buffers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adversarial import SIZE, TIME, WIDTH, labelled, refuse, refuse_layer, rows
from zoo.case import Model


@refuse_layer("largest_loss_of_the_batch", rows, "max", "amax")
def _(fc, x):
    return fc(x).sum(1).amax(0)


@refuse_layer("log_of_a_sum_over_the_batch", rows, "log", "sum")
def _(fc, x):
    return fc(x).exp().sum().log()


@refuse_layer("square_of_the_batch_loss", rows, "pow", "square", "mul", "sum", "mean")
def _(fc, x):
    return fc(x).square().mean().square()


@refuse_layer("root_of_the_mean_square", rows, "sqrt", "mean", "sum")
def _(fc, x):
    return F.mse_loss(fc(x), x).sqrt()


@refuse_layer("loss_clamped_after_the_mean", rows, "clamp", "mean", "sum", "relu")
def _(fc, x):
    """Flooding: the absolute value around a level."""
    return (fc(x).square().mean() - 0.4).abs()


@refuse_layer("product_over_the_batch", rows, "prod", "slices along the batch")
def _(fc, x):
    return fc(x).sum(1).prod()


@refuse_layer("loss_divided_by_its_own_value", rows, "div", "sum", "mean")
def _(fc, x):
    """Dynamic weighting of two losses by each other's size."""
    first, second = fc(x).square().mean(), fc(x).abs().mean()
    return first / second.detach() + second


@refuse_layer("variance_regularised_loss", rows, "var", "std", "mean", "sum")
def _(fc, x):
    losses = fc(x).square().mean(1)
    return losses.mean() + losses.var()


@refuse_layer("weight_decay_inside_a_scalar_loss", rows, "loss", "sum", "add", "per-sample", "sample", mixes=False)
def _(fc, x):
    """The penalty belongs to no sample: its gradient is neither clipped nor part of the sensitivity."""
    return fc(x).square().sum() + fc.weight.square().sum()


@refuse_layer(
    "cross_entropy_mean_inside", labelled, "div", "count", "cross_entropy", "reduction", "sum", "where", mixes=False
)
def _(fc, x, y):
    """Divides by how many labels are not ignored, which the graph computes from the batch even when none is."""
    return F.cross_entropy(fc(x), y)


@refuse_layer(
    "cross_entropy_with_ignored_labels",
    lambda: (torch.randn(SIZE, TIME, WIDTH), torch.randint(0, WIDTH, (SIZE, TIME))),
    *("div", "count", "cross_entropy", "reduction", "ignore_index", "sum", "where"),
)
def _(fc, x, y):
    """The token mean of Hugging Face models, `labels=` given."""
    return F.cross_entropy(fc(x).flatten(0, 1), y.flatten(), ignore_index=0)


@refuse_layer("cross_entropy_with_class_weights", labelled, "div", "sum", "cross_entropy", "reduction", "where")
def _(fc, x, y):
    """The weighted mean divides by the weights of the labels in the batch."""
    return F.cross_entropy(fc(x), y, weight=torch.arange(1.0, WIDTH + 1, device=x.device, dtype=x.dtype))


def _running_mean(m: nn.Module, x: Tensor) -> Tensor:
    y = m.fc(x)
    m.running.mul_(0.9).add_(0.1 * y.detach().mean(0))
    return y - m.running


def _counting_usage(m: nn.Module, x: Tensor) -> Tensor:
    m.seen.add_((x > 0).sum())
    return m.fc(x)


def _queue_of_features(m: nn.Module, x: Tensor) -> Tensor:
    y = m.fc(x)
    m.queue.copy_(y.detach())
    return y


refuse(
    "running_mean_of_the_batch",
    lambda: Model(_running_mean, fc=nn.Linear(WIDTH, WIDTH), running=torch.zeros(WIDTH)),
    rows,
    *("buffer", "running", "copy_", "mean", "sum", "mutat"),
)
refuse(
    "counter_of_the_data",
    lambda: Model(_counting_usage, fc=nn.Linear(WIDTH, WIDTH), seen=torch.zeros(())),
    rows,
    *("buffer", "seen", "copy_", "sum", "mutat"),
    mixes=False,
)
refuse(
    "queue_of_past_samples",
    lambda: Model(_queue_of_features, fc=nn.Linear(WIDTH, WIDTH), queue=torch.zeros(SIZE, WIDTH)),
    rows,
    *("buffer", "queue", "copy_", "mutat"),
    mixes=False,
)
