"""Normalisation within a sample, and batch normalisation that does not look at the batch."""

import torch
from torch import Tensor, nn

from zoo.case import Case, Sizes, register
from zoo.problems import floats, regression


class HandWrittenRMSNorm(nn.Module):
    """As model libraries write it: at least float32 inside, the weight multiplied last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def with_statistics(norm: nn.Module) -> nn.Module:
    """A batch norm in eval mode, with statistics off their initial values."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


def after_linear(n: Sizes, norm: nn.Module) -> nn.Module:
    """A linear in front, so that the norm's input has a gradient as well."""
    return nn.Sequential(nn.Linear(n.width, n.width), norm, nn.Linear(n.width, n.out))


@register(equal=True)
def layer_norm(n: Sizes) -> Case:
    return regression(lambda: after_linear(n, nn.LayerNorm(n.width)), floats(n.time, n.width), (n.time, n.out))


@register()
def layer_norm_2d(n: Sizes) -> Case:
    return regression(lambda: after_linear(n, nn.LayerNorm(n.width)), floats(n.width), (n.out,))


@register("peer")
def layer_norm_without_bias(n: Sizes) -> Case:
    return regression(
        lambda: after_linear(n, nn.LayerNorm(n.width, bias=False)), floats(n.time, n.width), (n.time, n.out)
    )


@register()
def layer_norm_without_parameters(n: Sizes) -> Case:
    return regression(
        lambda: after_linear(n, nn.LayerNorm(n.width, elementwise_affine=False)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register(equal=True)
def layer_norm_over_time_and_width(n: Sizes) -> Case:
    """The weight has shape [T, d], so only the batch is summed."""
    return regression(
        lambda: after_linear(n, nn.LayerNorm([n.time, n.width])), floats(n.time, n.width), (n.time, n.out)
    )


@register("peer", equal=True)
def rms_norm(n: Sizes) -> Case:
    return regression(lambda: after_linear(n, nn.RMSNorm(n.width)), floats(n.time, n.width), (n.time, n.out))


@register("peer", equal=True)
def rms_norm_by_hand(n: Sizes) -> Case:
    return regression(lambda: after_linear(n, HandWrittenRMSNorm(n.width)), floats(n.time, n.width), (n.time, n.out))


@register()
def rms_norm_on_heads(n: Sizes) -> Case:
    """Queries normalised per head: one weight for every head and token."""
    return regression(
        lambda: nn.Sequential(nn.Linear(n.width, 12), nn.Unflatten(-1, (2, 6)), nn.RMSNorm(6)),
        floats(n.time, n.width),
        (n.time, 2, 6),
    )


@register(equal=True)
def group_norm(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Conv1d(n.width, 8, 1), nn.GroupNorm(2, 8), nn.Conv1d(8, n.out, 1)),
        floats(n.width, n.time),
        (n.out, n.time),
    )


@register()
def group_norm_2d(n: Sizes) -> Case:
    """Input [B, C]: each group normalises its few channels."""
    return regression(lambda: nn.Sequential(nn.Linear(n.width, 12), nn.GroupNorm(2, 12)), floats(n.width), (12,))


@register("lookalike", equal=True)
def instance_norm(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Conv1d(n.width, n.out, 1), nn.InstanceNorm1d(n.out, affine=True)),
        floats(n.width, n.time),
        (n.out, n.time),
    )


@register("lookalike")
def batch_norm_in_eval_mode(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Linear(n.width, n.hidden), with_statistics(nn.BatchNorm1d(n.hidden))),
        floats(n.width),
        (n.hidden,),
    )


@register("lookalike")
def batch_norm_2d_in_eval_mode(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), with_statistics(nn.BatchNorm2d(3)), nn.ReLU()),
        floats(2, 6, 6),
        (3, 4, 4),
    )
