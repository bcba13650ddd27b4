"""Bare parameters: scales, temperatures, initial states, and weights computed from other parameters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo.case import Case, Model, Sizes, register
from zoo.problems import classification, floats, regression, squared_error


@register("peer", equal=True)
def scalar_temperature(n: Sizes) -> Case:
    return classification(
        lambda: Model(
            lambda m, x: m.fc(x) * m.scale.exp(), fc=nn.Linear(n.width, n.vocab), scale=nn.Parameter(torch.zeros(()))
        ),
        floats(n.width),
        n.vocab,
    )


@register("peer", equal=True)
def scale_per_channel(n: Sizes) -> Case:
    """LayerScale: a residual branch times a vector."""
    return regression(
        lambda: Model(lambda m, x: x + m.gamma * m.fc(x), fc=nn.Linear(n.width, n.width),
                      gamma=nn.Parameter(torch.full((n.width,), 0.5))),
        floats(n.time, n.width),
        (n.time, n.width),
    )  # fmt: skip


@register(equal=True)
def gain_and_bias_per_time_step(n: Sizes) -> Case:
    """Parameters of shape [T, 1] and [1, T, d], broadcast both over the batch and over features."""
    return regression(
        lambda: Model(lambda m, x: m.gain * x + m.bias, gain=nn.Parameter(torch.ones(n.time, 1)),
                      bias=nn.Parameter(torch.zeros(1, n.time, n.width))),
        floats(n.time, n.width),
        (n.time, n.width),
    )  # fmt: skip


@register(equal=True)
def prelu(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Linear(n.width, n.out), nn.PReLU(n.out), nn.Linear(n.out, n.out), nn.PReLU()),
        floats(n.width),
        (n.out,),
    )


@register(equal=True)
def learned_queries(n: Sizes) -> Case:
    """Perceiver style: the queries are a parameter, expanded over the batch."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        queries = m.queries.expand(x.shape[0], -1, -1)
        return (queries @ m.keys(x).mT).softmax(-1) @ m.values(x)

    return regression(
        lambda: Model(forward, queries=nn.Parameter(torch.randn(3, n.width)), keys=nn.Linear(n.width, n.width),
                      values=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        (3, n.out),
    )  # fmt: skip


@register()
def parameter_repeated_over_the_batch(n: Sizes) -> Case:
    """`repeat` copies where `expand` views."""
    return regression(
        lambda: Model(lambda m, x: torch.cat([x, m.prefix.repeat(x.shape[0], 1, 1)], 1) @ m.w,
                      prefix=nn.Parameter(torch.randn(1, 2, n.width)), w=nn.Parameter(torch.randn(n.width, n.out))),
        floats(n.time, n.width),
        (n.time + 2, n.out),
    )  # fmt: skip


@register(equal=True)
def weight_norm_by_hand(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: F.linear(x, m.g[:, None] * m.v / m.v.norm(dim=1, keepdim=True)),
                      g=nn.Parameter(torch.ones(n.out)), v=nn.Parameter(torch.randn(n.out, n.width))),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register()
def weight_norm_by_torch(n: Sizes) -> Case:
    return regression(lambda: weight_norm(nn.Linear(n.width, n.out)), floats(n.time, n.width), (n.time, n.out))


@register()
def weight_divided_by_its_norm(n: Sizes) -> Case:
    """Every entry of the weight scales every other: the map behind the reduction is dense."""
    return regression(
        lambda: Model(lambda m, x: F.linear(x, m.w / m.w.norm(), m.b), w=nn.Parameter(torch.randn(n.out, n.width)),
                      b=nn.Parameter(torch.zeros(n.out))),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register(equal=True)
def weight_from_an_outer_product(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: x @ torch.outer(m.u, m.v), u=nn.Parameter(torch.randn(n.width)),
                      v=nn.Parameter(torch.randn(n.out))),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register(equal=True)
def causal_mixing_matrix(n: Sizes) -> Case:
    """A [T, T] parameter under a softmax, with the future masked."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        future = torch.ones(n.time, n.time, dtype=torch.bool, device=x.device).triu(1)
        return m.mix.masked_fill(future, float("-inf")).softmax(-1) @ x

    return regression(
        lambda: Model(forward, mix=nn.Parameter(torch.randn(n.time, n.time))),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register()
def softmax_of_a_parameter(n: Sizes) -> Case:
    """Weighted average of branches, as in architecture search."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b, c = m.alpha.softmax(0)
        return a * m.fc(x) + b * x.tanh() + c * x

    return regression(
        lambda: Model(forward, alpha=nn.Parameter(torch.zeros(3)), fc=nn.Linear(n.width, n.width)),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register()
def same_parameter_as_scale_and_shift(n: Sizes) -> Case:
    """One vector enters twice, multiplied and added: its two gradients are summed before the norm."""
    return regression(
        lambda: Model(lambda m, x: x * m.v + m.v.square(), v=nn.Parameter(torch.randn(n.width))),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register()
def complex_rotation_by_angles(n: Sizes) -> Case:
    """Trigonometric functions of a parameter, broadcast over batch and time."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * m.a.cos() - second * m.a.sin(), first * m.a.sin() + second * m.a.cos()], -1)

    return regression(
        lambda: Model(forward, a=nn.Parameter(torch.randn(n.width // 2))), floats(n.time, n.width), (n.time, n.width)
    )


@register("may_refuse")
def weight_decay_per_sample(n: Sizes) -> Case:
    """Every sample's loss holds the penalty: clipping applies to the sum of both gradients."""
    return Case(
        build=lambda: Model(lambda m, x: (m.fc(x), m.fc.weight.square().sum()), fc=nn.Linear(n.width, n.out)),
        inputs=floats(n.width),
        targets=lambda size: torch.randn(size, n.out),
        loss=lambda output, target: squared_error(output[0], target) + 0.1 * output[1],
    )


@register("peer", equal=True)
def positions_from_the_second_on(n: Sizes) -> Case:
    """ViT leaves out the position of the class token: a slice with an open end."""
    return regression(
        lambda: Model(lambda m, x: x * m.positions[:, 1:], positions=nn.Parameter(torch.randn(1, n.time + 1, n.width))),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register()
def every_other_row_of_a_weight(n: Sizes) -> Case:
    """Slices with steps, and with bounds that count from the end."""
    return regression(
        lambda: Model(lambda m, x: F.linear(x, m.rows[1:-1:2]) * m.columns[-n.out :],
                      rows=nn.Parameter(torch.randn(2 * n.out + 1, n.width)),
                      columns=nn.Parameter(torch.randn(n.out + 2))),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register(equal=True)
def one_row_of_a_parameter(n: Sizes) -> Case:
    """Selected at a fixed place, counted from the end."""
    return regression(
        lambda: Model(lambda m, x: m.fc(x) * m.rows[-1] + m.rows[:, 0].sum(),
                      fc=nn.Linear(n.width, n.out), rows=nn.Parameter(torch.randn(3, n.out))),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


def linear_of(weight: Callable[[Tensor], Tensor], n: Sizes, *shape: int) -> Case:
    """A linear layer whose weight is made of a parameter."""
    return regression(
        lambda: Model(lambda m, x: F.linear(x, weight(m.w)), w=nn.Parameter(torch.randn(shape))),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def weight_backwards(n: Sizes) -> Case:
    return linear_of(lambda w: w.mT.flip(0).flip(1), n, n.width, n.out)


@register()
def rolled_weight(n: Sizes) -> Case:
    return linear_of(lambda w: w.mT.roll(1, 0), n, n.width, n.out)


@register()
def cumulative_weight(n: Sizes) -> Case:
    return linear_of(lambda w: w.cumsum(0), n, n.out, n.width)


@register()
def padded_weight(n: Sizes) -> Case:
    return linear_of(lambda w: F.pad(w, (1, 0, 0, 2)), n, n.out - 2, n.width - 1)


@register()
def weight_that_solves_systems(n: Sizes) -> Case:
    """The systems are constants; what is solved for is linear in the parameter."""

    def build() -> nn.Module:
        triangle = torch.randn(n.width, n.width).tril(-1) + 3 * torch.eye(n.width)
        factors, pivots = torch.linalg.lu_factor(triangle + triangle.mT)
        w = nn.Parameter(torch.randn(n.width, n.out))
        return Model(forward, w=w, triangle=triangle, factors=factors, pivots=pivots)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        w = torch.linalg.solve_triangular(m.triangle, m.w, upper=False)
        return x @ torch.cholesky_solve(torch.linalg.lu_solve(m.factors, m.pivots, w), m.triangle)

    return regression(build, floats(n.time, n.width), (n.time, n.out))


@register(equal=True)
def weight_read_across_its_rows(n: Sizes) -> Case:
    """A transpose is read row by row under another shape, which is no view of the product that its gradient is."""
    return linear_of(lambda w: w.t().reshape(w.shape[0], w.shape[1]), n, n.out, n.width)
