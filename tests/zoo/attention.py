"""Attention over time, by every route that torch offers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, mask_of_lengths, regression, several, time_major_error


class SelfAttention(nn.Module):
    """One projection to queries, keys and values, then scaled_dot_product_attention; causal unless a mask is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class GroupedQueryAttention(nn.Module):
    """Several query heads read one head of keys and values, with rotary positions; as in Llama."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, 4
        self.q = nn.Linear(width, heads * self.size, bias=False)
        self.k = nn.Linear(width, self.size, bias=False)
        self.v = nn.Linear(width, self.size, bias=False)
        self.out = nn.Linear(heads * self.size, width, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] * torch.tensor(
            [1.0, 0.1], device=x.device, dtype=x.dtype
        )
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        size, time, _ = x.shape
        q = self.rotate(self.q(x).view(size, time, self.heads, self.size).transpose(1, 2))
        k = self.rotate(self.k(x).view(size, time, 1, self.size).transpose(1, 2))
        v = self.v(x).view(size, time, 1, self.size).transpose(1, 2)
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(size, time, -1))


@register(equal=True)
def causal_attention(n: Sizes) -> Case:
    return regression(lambda: SelfAttention(n.width, n.heads), floats(n.time, n.width), (n.time, n.width))


@register(equal=True)
def attention_with_padding(n: Sizes) -> Case:
    """The mask is data: each sample has its own length."""
    return regression(
        lambda: Model(
            lambda m, x, real: m.attention(x, real[:, None, None, :]), attention=SelfAttention(n.width, n.heads)
        ),
        lambda size: (torch.randn(size, n.time, n.width), mask_of_lengths(size, n.time)),
        (n.time, n.width),
    )


@register("lookalike", equal=True)
def attention_with_mask_read_by_counting(n: Sizes) -> Case:
    """Sample b asks for row b of the mask by its number, so that no op joins the sizes of the two inputs."""

    def forward(m: nn.Module, x: Tensor, real: Tensor) -> Tensor:
        own = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
        keys = torch.arange(n.time, device=x.device)[None, None, None, :]
        return m.attention(x, real[own, keys])

    return regression(
        lambda: Model(forward, attention=SelfAttention(n.width, n.heads)),
        lambda size: (torch.randn(size, n.time, n.width), mask_of_lengths(size, n.time)),
        (n.time, n.width),
    )


@register()
def attention_with_public_mask(n: Sizes) -> Case:
    """A [T, T] mask given as an input that is no sample data and must be declared public."""
    return regression(
        lambda: SelfAttention(n.width, n.heads),
        lambda size: {"x": torch.randn(size, n.time, n.width), "mask": torch.ones(n.time, n.time).tril().bool()},
        (n.time, n.width),
        public=("mask",),
        options={"public_inputs": ("*mask",)},
    )


@register("lookalike", equal=True)
def attention_by_hand(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        scores = m.q(x) @ m.k(x).transpose(-2, -1) / n.width**0.5
        future = torch.ones(n.time, n.time, device=x.device, dtype=torch.bool).triu(1)
        return torch.softmax(scores.masked_fill(future, float("-inf")), -1) @ m.v(x)

    return regression(
        lambda: Model(forward, **{name: nn.Linear(n.width, n.width) for name in "qkv"}),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register("lookalike", equal=True)
def attention_by_einsum(n: Sizes) -> Case:
    """Separate weights for every head, heads merged with the batch inside the matrix products."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, w) for w in (m.q, m.k, m.v))
        return torch.einsum("bhtu,bhuk,hkd->btd", torch.einsum("bhtk,bhuk->bhtu", q, k).softmax(-1), v, m.out)

    shape = (n.heads, n.width, 3)
    return regression(
        lambda: Model(
            forward, q=nn.Parameter(0.4 * torch.randn(shape)), k=nn.Parameter(0.4 * torch.randn(shape)),
            v=nn.Parameter(0.4 * torch.randn(shape)), out=nn.Parameter(0.4 * torch.randn(n.heads, 3, n.width)),
        ),
        floats(n.time, n.width),
        (n.time, n.width),
    )  # fmt: skip


@register(equal=True)
def cross_attention(n: Sizes) -> Case:
    """Queries from one input, keys and values from a longer one."""

    def forward(m: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.q(x), m.k(memory), m.v(memory))

    return regression(
        lambda: Model(forward, **{name: nn.Linear(n.width, n.width) for name in "qkv"}),
        several(floats(n.time, n.width), floats(n.time + 3, n.width)),
        (n.time, n.width),
    )


@register(equal=True)
def grouped_query_attention(n: Sizes) -> Case:
    return regression(lambda: GroupedQueryAttention(n.width, n.heads), floats(n.time, n.width), (n.time, n.width))


@register("lookalike", equal=True)
def linear_attention(n: Sizes) -> Case:
    """Keys times values first: a [d, d] state per sample, a product of two things that carry the batch."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        state = m.k(x).softmax(1).mT @ m.v(x)
        return m.q(x).softmax(-1) @ state

    return regression(
        lambda: Model(forward, **{name: nn.Linear(n.width, n.width) for name in "qkv"}),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register("lookalike", equal=True)
def multihead_attention(n: Sizes) -> Case:
    return regression(
        lambda: Model(
            lambda m, x: m.attention(x, x, x, need_weights=False)[0],
            attention=nn.MultiheadAttention(n.width, n.heads, batch_first=True),
        ),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register(equal=True)
def multihead_attention_time_major(n: Sizes) -> Case:
    """[T, B, d] with the batch in dimension 1, and the attention weights computed as well."""
    return Case(
        build=lambda: Model(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(n.width, n.heads)),
        inputs=lambda size: (torch.randn(n.time, size, n.width),),
        targets=lambda size: torch.randn(n.time, size, n.width),
        loss=time_major_error,
        batch_dim=1,
    )


@register()
def multihead_attention_with_padding(n: Sizes) -> Case:
    return regression(
        lambda: Model(
            lambda m, x, real: m.attention(x, x, x, key_padding_mask=~real, need_weights=False)[0],
            attention=nn.MultiheadAttention(n.width, n.heads, batch_first=True),
        ),
        lambda size: (torch.randn(size, n.time, n.width), mask_of_lengths(size, n.time)),
        (n.time, n.width),
    )


@register()
def multihead_cross_attention_to_queries(n: Sizes) -> Case:
    """Queries are a parameter of the model; three inputs of one MultiheadAttention."""
    return regression(
        lambda: Model(
            lambda m, x: m.attention(m.queries.expand(x.shape[0], -1, -1), x, x.tanh(), need_weights=False)[0],
            queries=nn.Parameter(torch.randn(1, 3, n.width)),
            attention=nn.MultiheadAttention(n.width, n.heads, batch_first=True),
        ),
        floats(n.time, n.width),
        (3, n.width),
    )
