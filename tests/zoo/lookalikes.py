"""Models that resemble a refused one, with the same op along another axis: they must be accepted, and be exact."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression, several


def around(n: Sizes, middle: Callable[[Tensor], Tensor], *shape: int) -> Case:
    """body -> `middle` on [B, T, out] -> squared error; the shape behind `middle` is [B, *shape]."""
    return regression(
        lambda: Model(lambda m, x: middle(m.body(x)), body=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        shape or (n.time, n.out),
    )


@register("lookalike", equal=True)
def flip_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y + y.flip(1))


@register("lookalike", equal=True)
def roll_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y * y.roll(1, 1).tanh())


@register("lookalike", equal=True)
def cumsum_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y.cumsum(1))


@register("lookalike", equal=True)
def softmax_over_features(n: Sizes) -> Case:
    return around(n, lambda y: y.softmax(-1))


@register("lookalike")
def softmax_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y.log_softmax(1))


@register("lookalike", equal=True)
def centred_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y - y.mean(1, keepdim=True))


@register("lookalike", equal=True)
def divided_by_its_norm(n: Sizes) -> Case:
    return around(n, lambda y: y / y.norm(dim=-1, keepdim=True))


@register("lookalike")
def normalized_over_features(n: Sizes) -> Case:
    return around(n, lambda y: F.normalize(y, dim=-1))


@register("lookalike")
def standard_deviation_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y.std(1), n.out)


@register("lookalike")
def median_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y.median(1).values, n.out)


@register("lookalike", equal=True)
def two_largest_features(n: Sizes) -> Case:
    return around(n, lambda y: y.topk(2, -1).values, n.time, 2)


@register("lookalike", equal=True)
def sorted_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y.sort(1).values)


@register("lookalike")
def product_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y.tanh().prod(1), n.out)


@register("lookalike", equal=True)
def log_of_sum_over_time(n: Sizes) -> Case:
    return around(n, lambda y: y.logsumexp(1), n.out)


@register("lookalike", equal=True)
def products_of_tokens(n: Sizes) -> Case:
    """y @ y.T within each sample: [B, T, T], where the refused one is [B, B]."""
    return around(n, lambda y: y @ y.mT, n.time, n.time)


@register("lookalike", equal=True)
def plus_its_transpose(n: Sizes) -> Case:
    """x + x.T within each sample."""
    return regression(
        lambda: Model(lambda m, x: m.body(x) + m.body(x).mT, body=nn.Linear(n.time, n.time)),
        floats(n.time, n.time),
        (n.time, n.time),
    )


@register("lookalike", equal=True)
def diagonal_of_products(n: Sizes) -> Case:
    """Token t times its own mirror image, by way of all pairs."""
    return around(n, lambda y: (y @ y.flip(1).mT).diagonal(0, 1, 2), n.time)


@register("lookalike", equal=True)
def distances_of_tokens(n: Sizes) -> Case:
    return around(n, lambda y: 0.3 * (y[:, :, None] - y[:, None]).square().sum(-1), n.time, n.time)


@register("lookalike")
def running_product_over_time(n: Sizes) -> Case:
    return around(n, lambda y: (1 + 0.1 * y.tanh()).cumprod(1))


@register("lookalike")
def fixed_permutation_of_time(n: Sizes) -> Case:
    order = list(range(1, n.time, 2)) + list(range(0, n.time, 2))
    return around(n, lambda y: y + y[:, order])


@register("lookalike", equal=True)
def every_other_token(n: Sizes) -> Case:
    return around(n, lambda y: y[:, ::2], n.time // 2, n.out)


@register("lookalike", equal=True)
def merged_with_time_and_split(n: Sizes) -> Case:
    """[B, T, d] -> [B T, d] -> [B, T, d] with an op between."""
    return around(n, lambda y: y.reshape(-1, n.out).softmax(-1).reshape(-1, n.time, n.out))


@register("lookalike", equal=True)
def merged_time_major_and_split(n: Sizes) -> Case:
    """[B, T, d] -> [T B, d] -> [B, T, d]: the batch is the inner factor."""
    return around(
        n, lambda y: y.transpose(0, 1).reshape(-1, n.out).sigmoid().reshape(n.time, -1, n.out).transpose(0, 1)
    )


@register("lookalike", equal=True)
def divided_by_a_constant(n: Sizes) -> Case:
    return around(n, lambda y: y / y.shape[-1] + y * y.shape[1])


@register("lookalike", equal=True)
def bilinear_pooling(n: Sizes) -> Case:
    """An outer product of two inputs of one sample."""
    return regression(
        lambda: Model(lambda m, a, b: m.a(a)[:, :, None] * m.b(b)[:, None, :], a=nn.Linear(n.width, n.out),
                      b=nn.Linear(n.width, n.out)),
        several(floats(n.width), floats(n.width)),
        (n.out, n.out),
    )  # fmt: skip


@register("lookalike", equal=True)
def two_views_through_one_encoder(n: Sizes) -> Case:
    """Two views of each sample stacked along the batch, encoded at once, split, and compared with each other."""

    def forward(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        first, second = m.encode(torch.cat([a, b], 0)).chunk(2, 0)
        return first.tanh() * second

    return regression(
        lambda: Model(forward, encode=nn.Linear(n.width, n.out)), several(floats(n.width), floats(n.width)), (n.out,)
    )


@register("lookalike", equal=True)
def one_view_of_two(n: Sizes) -> Case:
    """As above, but the first view's encoding is not used: what it gets back is zeros, in front of the batch."""
    return regression(
        lambda: Model(lambda m, a, b: m.encode(torch.cat([a, b], 0)).chunk(2, 0)[1], encode=nn.Linear(n.width, n.out)),
        several(floats(n.width), floats(n.width)),
        (n.out,),
    )


@register("lookalike", equal=True)
def three_draws_of_each_sample(n: Sizes) -> Case:
    """Augmentation multiplicity: samples repeated in the batch, then averaged within each sample."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.body(x.repeat_interleave(3, 0)).tanh()
        return y.unflatten(0, (-1, 3)).mean(1)

    return regression(lambda: Model(forward, body=nn.Linear(n.width, n.out)), floats(n.width), (n.out,))


@register("lookalike", equal=True)
def samples_tiled_over_the_batch(n: Sizes) -> Case:
    """The same with `repeat`: the copies are the outer factor."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.body(x.repeat(3, 1)).tanh().unflatten(0, (3, -1)).mean(0)

    return regression(lambda: Model(forward, body=nn.Linear(n.width, n.out)), floats(n.width), (n.out,))


@register("lookalike", "may_refuse")
def split_and_joined_batch(n: Sizes) -> Case:
    """The batch unbound into samples, each run alone, and stacked again: exact or refused, it is refused."""
    return regression(
        lambda: Model(lambda m, x: torch.stack([m.body(row) for row in x.unbind(0)]), body=nn.Linear(n.width, n.out)),
        floats(n.width),
        (n.out,),
    )


@register("lookalike")
def counted_within_a_sample(n: Sizes) -> Case:
    """Scaled by how many of its own entries are positive."""
    return around(n, lambda y: y * (y > 0).sum((1, 2), keepdim=True))


@register("lookalike")
def spectrum_over_time(n: Sizes) -> Case:
    return around(n, lambda y: torch.fft.rfft(y, dim=1).abs(), n.time // 2 + 1, n.out)


@register("lookalike", equal=True)
def per_sample_linear_solve(n: Sizes) -> Case:
    """Batched linear algebra: one small system per sample."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        gram = x @ x.mT + torch.eye(n.time, device=x.device, dtype=x.dtype)
        return torch.linalg.solve_ex(gram, m.body(x)).result

    return regression(lambda: Model(forward, body=nn.Linear(n.width, n.out)), floats(n.time, n.width), (n.time, n.out))


def factored(n: Sizes, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Case:
    """`function` of [B, T, T], symmetric and well conditioned, and of [B, T, out]; both depend on the weights."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.body(x).tanh()
        return function(y @ y.mT + torch.eye(n.time, device=x.device, dtype=x.dtype), y)

    return regression(
        lambda: Model(forward, body=nn.Linear(n.width, n.out)), floats(n.time, n.width), shape or (n.time, n.out)
    )


@register("lookalike", equal=True)
def solved_by_inverse(n: Sizes) -> Case:
    return factored(n, lambda a, y: torch.linalg.inv_ex(a).inverse @ y)


@register("lookalike", equal=True)
def solved_for_a_vector(n: Sizes) -> Case:
    return factored(n, lambda a, y: torch.linalg.solve_ex(a, y[..., 0]).result, n.time)


@register("lookalike")
def whitened_by_cholesky(n: Sizes) -> Case:
    return factored(n, lambda a, y: torch.linalg.solve_triangular(torch.linalg.cholesky_ex(a).L, y, upper=False))


@register("lookalike")
def solved_by_cholesky(n: Sizes) -> Case:
    return factored(n, lambda a, y: torch.cholesky_solve(y, torch.linalg.cholesky_ex(a).L))


@register("lookalike")
def log_determinant(n: Sizes) -> Case:
    """A normalizing flow's volume: one number per sample."""
    return factored(n, lambda a, y: torch.linalg.slogdet(a).logabsdet.unsqueeze(-1) + torch.linalg.det(a)[:, None], 1)


@register("lookalike")
def matrix_exponential(n: Sizes) -> Case:
    return factored(n, lambda a, y: torch.linalg.matrix_exp(0.2 * a) @ y)


@register("lookalike")
def eigenvalues(n: Sizes) -> Case:
    return factored(n, lambda a, y: torch.linalg.eigvalsh(a + torch.arange(n.time).to(a).diag()), n.time)


@register("lookalike", equal=True)
def rows_of_a_table_whose_rows_are_equal(n: Sizes) -> Case:
    """As transformers finds sequences that are packed: the place in the batch names a row, and all rows are equal."""

    def middle(y: Tensor) -> Tensor:
        rows, times = (torch.arange(size, device=y.device) for size in y.shape[:2])
        positions = times.expand(y.shape[0], -1)
        return y * (positions[rows[:, None], times] < n.time - 1)[..., None]

    return around(n, middle)
