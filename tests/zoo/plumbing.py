"""How data enters and leaves a model: dictionaries, several inputs and outputs, masks, pooling, and branches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import (
    class_cross_entropy,
    classification,
    floats,
    mask_of_lengths,
    masked_cross_entropy,
    regression,
    several,
    squared_error,
)


@register()
def keyword_inputs(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, a, b: m.a(a) * m.b(b), a=nn.Linear(n.width, n.out), b=nn.Linear(5, n.out)),
        lambda size: {"b": torch.randn(size, 5), "a": torch.randn(size, n.width)},
        (n.out,),
    )


@register("peer")
def one_dictionary_as_input(n: Sizes) -> Case:
    """A collated batch handed over whole, with a nested pair inside."""
    return regression(
        lambda: Model(
            lambda m, batch: m.fc(batch["x"]) * batch["scales"][0] + batch["scales"][1], fc=nn.Linear(n.width, n.out)
        ),
        lambda size: ({"x": torch.randn(size, n.width), "scales": (torch.randn(size, 1), torch.randn(size, n.out))},),
        (n.out,),
    )


@register()
def several_inputs(n: Sizes) -> Case:
    """Floats, ids and a mask of different ranks."""

    def forward(m: nn.Module, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return m.fc(x)[:, None, :] * mask[..., None] + m.table(ids)

    return regression(
        lambda: Model(forward, fc=nn.Linear(n.width, n.out), table=nn.Embedding(n.vocab, n.out)),
        lambda size: (
            torch.randn(size, n.width), torch.randint(0, n.vocab, (size, n.time)), torch.rand(size, n.time) < 0.5,
        ),
        (n.time, n.out),
    )  # fmt: skip


@register()
def several_outputs(n: Sizes) -> Case:
    """Two heads, two targets, one loss per sample."""
    return Case(
        build=lambda: Model(
            lambda m, x: (m.classes(m.body(x).relu()), m.values(m.body(x).tanh())),
            body=nn.Linear(n.width, n.hidden), classes=nn.Linear(n.hidden, n.vocab), values=nn.Linear(n.hidden, 3),
        ),
        inputs=floats(n.width),
        targets=lambda size: (torch.randint(0, n.vocab, (size,)), torch.randn(size, 3)),
        loss=lambda out, target: class_cross_entropy(out[0], target[0]) + 2 * squared_error(out[1], target[1]),
    )  # fmt: skip


@register()
def dictionary_as_output(n: Sizes) -> Case:
    return Case(
        build=lambda: Model(
            lambda m, x: {"logits": m.head(m.body(x)), "hidden": m.body(x)},
            body=nn.Linear(n.width, n.hidden),
            head=nn.Linear(n.hidden, n.vocab),
        ),
        inputs=floats(n.width),
        targets=lambda size: torch.randint(0, n.vocab, (size,)),
        loss=lambda out, target: class_cross_entropy(out["logits"], target) + out["hidden"].square().mean(1),
    )


@register("lookalike")
def loss_over_labelled_tokens_of_each_sample(n: Sizes) -> Case:
    """Ignored labels, divided by each sample's own count: the right form of the token mean that is refused."""
    return Case(
        build=lambda: nn.Linear(n.width, n.vocab),
        inputs=floats(n.time, n.width),
        targets=lambda size: torch.randint(0, n.vocab, (size, n.time)).where(mask_of_lengths(size, n.time), -100),
        loss=masked_cross_entropy,
    )


@register("lookalike")
def weighted_samples(n: Sizes) -> Case:
    """A weight per sample comes with the data."""
    return Case(
        build=lambda: nn.Linear(n.width, n.out),
        inputs=floats(n.width),
        targets=lambda size: (torch.randn(size, n.out), torch.rand(size)),
        loss=lambda out, target: squared_error(out, target[0]) * target[1],
    )


@register("lookalike", equal=True)
def mean_over_real_tokens(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        weight = mask.to(x.dtype)[..., None]
        return m.head((m.body(x).tanh() * weight).sum(1) / weight.sum(1))

    return classification(
        lambda: Model(forward, body=nn.Linear(n.width, n.hidden), head=nn.Linear(n.hidden, n.vocab)),
        lambda size: (torch.randn(size, n.time, n.width), mask_of_lengths(size, n.time)),
        n.vocab,
    )


@register("lookalike", equal=True)
def last_token_of_each_sample(n: Sizes) -> Case:
    """x[arange(B), lengths]: an index with one number per sample, along the batch axis itself."""
    return classification(
        lambda: Model(
            lambda m, x, last: m.head(m.body(x).tanh()[torch.arange(x.shape[0], device=x.device), last]),
            body=nn.Linear(n.width, n.hidden),
            head=nn.Linear(n.hidden, n.vocab),
        ),
        lambda size: (torch.randn(size, n.time, n.width), torch.randint(0, n.time, (size,))),
        n.vocab,
    )


@register("lookalike", equal=True)
def gather_along_time(n: Sizes) -> Case:
    """Each sample picks three of its tokens, one of them maybe twice."""
    return regression(
        lambda: Model(
            lambda m, x, index: m.body(x).gather(1, index[..., None].expand(-1, -1, n.out)),
            body=nn.Linear(n.width, n.out),
        ),
        lambda size: (torch.randn(size, n.time, n.width), torch.randint(0, n.time, (size, 3))),
        (3, n.out),
    )


@register("lookalike")
def scatter_along_time(n: Sizes) -> Case:
    """Each sample adds its tokens into slots of its own choice."""

    def forward(m: nn.Module, x: Tensor, slots: Tensor) -> Tensor:
        y = m.body(x)
        return torch.zeros_like(y).scatter_add(1, slots[..., None].expand_as(y), y)

    return regression(
        lambda: Model(forward, body=nn.Linear(n.width, n.out)),
        lambda size: (torch.randn(size, n.time, n.width), torch.randint(0, n.time, (size, n.time))),
        (n.time, n.out),
    )


@register("lookalike", equal=True)
def max_over_time(n: Sizes) -> Case:
    return classification(
        lambda: Model(
            lambda m, x: m.head(m.body(x).amax(1)), body=nn.Linear(n.width, n.hidden), head=nn.Linear(n.hidden, n.vocab)
        ),
        floats(n.time, n.width),
        n.vocab,
    )


@register("peer")
def branch_on_a_shape(n: Sizes) -> Case:
    """Which layer runs depends on the length of the input."""
    return regression(
        lambda: Model(lambda m, x: m.short(x) if x.shape[1] < 6 else m.long(x), short=nn.Linear(n.width, n.out),
                      long=nn.Linear(n.width, n.out).requires_grad_(False)),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register()
def dropout_mask_as_data(n: Sizes) -> Case:
    return regression(
        lambda: Model(
            lambda m, x, keep: m.head(m.body(x).relu() * keep / 0.8), body=nn.Linear(n.width, n.hidden),
            head=nn.Linear(n.hidden, n.out),
        ),
        lambda size: (torch.randn(size, n.width), torch.rand(size, n.hidden) < 0.8),
        (n.out,),
    )  # fmt: skip


@register()
def huber_and_likelihood(n: Sizes) -> Case:
    """Losses with branches: a mean and a log-variance, under a Gaussian likelihood and a Huber loss."""

    def loss(out: Tensor, target: Tensor) -> Tensor:
        mean, log_variance = out.chunk(2, -1)
        likelihood = 0.5 * (log_variance + (target - mean).square() * torch.exp(-log_variance))
        return (likelihood + F.smooth_l1_loss(mean, target, reduction="none")).sum(-1)

    return Case(
        build=lambda: nn.Sequential(nn.Linear(n.width, n.hidden), nn.Tanh(), nn.Linear(n.hidden, 6)),
        inputs=floats(n.width),
        targets=lambda size: torch.randn(size, 3),
        loss=loss,
    )


@register("lookalike", equal=True)
def triplet_inside_each_sample(n: Sizes) -> Case:
    """A contrastive loss whose negatives come with the sample, not from the batch."""
    return Case(
        build=lambda: Model(
            lambda m, *views: tuple(F.normalize(m.encode(view), dim=-1) for view in views),
            encode=nn.Linear(n.width, n.out),
        ),
        inputs=several(floats(n.width), floats(n.width), floats(n.width)),
        targets=lambda size: torch.rand(size),
        loss=lambda out, margin: F.softplus((out[0] * (out[2] - out[1])).sum(-1) + margin),
    )
