"""Writes by index into tensors whose rows are one row in memory: a compiler that writes in place mixes the samples."""

import torch
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression


class Slots(nn.Module):
    """[B, T, d] -> [B, slots, d]: every token is added to a slot, the same for all samples; `start` makes the slots."""

    def __init__(self, n: Sizes, start) -> None:
        super().__init__()
        self.fc, self.slots, self.start = nn.Linear(n.width, n.width), nn.Parameter(torch.randn(3, n.width)), start
        self.register_buffer("slot", torch.arange(n.time) % 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.start(self, x).index_add(1, self.slot, self.fc(x)) * self.slots


def slots(n: Sizes, start) -> Case:
    return regression(lambda: Slots(n, start), floats(n.time, n.width), (3, n.width))


@register(equal=True)
def added_into_expanded_zeros(n: Sizes) -> Case:
    return slots(n, lambda m, x: x.new_zeros(3, x.shape[2]).expand(x.shape[0], -1, -1))


@register()
def added_into_an_expanded_value(n: Sizes) -> Case:
    return slots(n, lambda m, x: m.slots.tanh().expand(x.shape[0], -1, -1))


@register()
def added_into_an_expanded_value_plus_zeros(n: Sizes) -> Case:
    """The sum is a tensor of its own, until a compiler drops the zeros."""
    return slots(n, lambda m, x: m.slots.tanh().expand(x.shape[0], -1, -1) + x.new_zeros(x.shape[0], 3, x.shape[2]))


@register()
def added_into_an_expanded_value_times_ones(n: Sizes) -> Case:
    """The same with a view on top, and ones."""
    return slots(
        n,
        lambda m, x: (m.slots.tanh().expand(x.shape[0], -1, -1) * torch.ones_like(x[:, :3])).mT.mT,
    )


@register()
def assigned_to_an_expanded_value(n: Sizes) -> Case:
    """Assignment by an index of a list: other rows keep the value that all samples share."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        out = m.rows.tanh().expand(x.shape[0], -1, -1) + x.new_zeros(x.shape[0], 3, x.shape[2])
        out[:, [0, 2]] = m.fc(x)[:, :2]
        return out

    return regression(
        lambda: Model(forward, fc=nn.Linear(n.width, n.width), rows=nn.Parameter(torch.randn(3, n.width))),
        floats(n.time, n.width),
        (3, n.width),
    )
