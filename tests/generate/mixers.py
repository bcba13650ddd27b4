"""Ops that mix samples: each takes a value and the dimension that holds its samples, and gives one of the same shape.

`FLOATS` are for floating values, `OTHERS` for ids and masks; `WRAPS` say how the result enters the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Mixer = Callable[[Tensor, int], Tensor]


def rows(function: Callable[[Tensor], Tensor]) -> Mixer:
    """A mixer from a function of [N, features]."""

    def mixer(x: Tensor, d: int) -> Tensor:
        moved = x.movedim(d, 0)
        return function(moved.reshape(x.shape[d], -1)).reshape(moved.shape).movedim(0, d)

    return mixer


def first(x: Tensor, d: int) -> Tensor:
    return x.narrow(d, 0, 1)


def order(x: Tensor, d: int) -> Tensor:
    """A permutation of the samples that is no shift: 1, 0, 3, 2, ..., and the last stays if it has no partner."""
    n = x.shape[d]
    places = torch.arange(n) ^ 1
    return torch.where(places < n, places, n - 1)


def neighbour(x: Tensor, d: int) -> Tensor:
    return torch.cat([x.narrow(d, 1, x.shape[d] - 1), first(x, d)], d)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0]


def recurrence(x: Tensor, d: int) -> Tensor:
    state, states = torch.zeros_like(x.select(d, 0)), []
    for row in x.unbind(d):
        state = (row + 0.5 * state).tanh()
        states.append(state)
    return torch.stack(states, d)


def only_backward(x: Tensor, d: int) -> Tensor:
    """The value stays, its gradient is shared."""
    mean = x.mean(d, keepdim=True)
    return x + (mean - mean.detach())


def transposed(x: Tensor, d: int) -> Tensor:
    """Elements in another order: batch and features trade places in memory."""
    return x.movedim(d, -1).reshape(x.shape)


def convolved(x: Tensor) -> Tensor:
    return F.conv1d(x.t()[:, None], x.new_ones(1, 1, 3), padding=1)[:, 0].t()


def resampled(x: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool1d(x.t()[None], 2), size=x.shape[0])[0].t()


def strided(x: Tensor) -> Tensor:
    """The rows backwards through memory, from the second on."""
    x = x.contiguous()
    n, f = x.shape
    return torch.cat([x[:1], x.as_strided((n - 1, f), (f, 1), 0)])


FLOATS: dict[str, Mixer] = {
    "mean": lambda x, d: x - x.mean(d, keepdim=True),
    "sum": lambda x, d: x + 0.1 * x.sum(d, keepdim=True),
    "total": lambda x, d: x * x.sum().sigmoid(),
    "softmax": lambda x, d: x.softmax(d),
    "log_softmax": lambda x, d: x.log_softmax(d),
    "cumsum": lambda x, d: x.cumsum(d),
    "cumprod": lambda x, d: (1 + x.tanh() / 2).cumprod(d),
    "cummax": lambda x, d: x.cummax(d).values,
    "logcumsumexp": lambda x, d: x.logcumsumexp(d),
    "sort": lambda x, d: x.sort(d).values,
    "topk": lambda x, d: x - x.topk(2, d).values.narrow(d, 1, 1),
    "flip": lambda x, d: x + x.flip(d),
    "only flipped": lambda x, d: x.flip(d),
    "roll": lambda x, d: x.roll(1, d),
    "roll all": lambda x, d: x.roll(1),
    "permutation": lambda x, d: x.index_select(d, order(x, d)),
    "shuffled by index": rows(lambda x: x[order(x, 0)]),
    "batch norm": rows(lambda x: F.batch_norm(x, None, None, training=True)),
    "variance": lambda x, d: x / (1 + x.var(d, correction=0, keepdim=True)),
    "std": lambda x, d: x / (1 + x.std(d, keepdim=True)),
    "amax": lambda x, d: x - x.amax(d, keepdim=True),
    "max": lambda x, d: x * x.max(d, keepdim=True).values.sigmoid(),
    "minimum of all": lambda x, d: x - x.min(),
    "median": lambda x, d: x - x.median(d, keepdim=True).values,
    "logsumexp": lambda x, d: x - x.logsumexp(d, keepdim=True),
    "norm": lambda x, d: x / (1 + x.norm(2, d, keepdim=True)),
    "norm of all": lambda x, d: x / x.norm().clamp(min=0.1),
    "prod": lambda x, d: x * x.sigmoid().prod(d, keepdim=True),
    "first sample": lambda x, d: x - first(x, d),
    "expanded first sample": lambda x, d: first(x, d).expand_as(x),
    "last sample": lambda x, d: x * x.select(d, -1).unsqueeze(d).tanh(),
    "neighbour": lambda x, d: x + neighbour(x, d),
    "lerp with neighbour": lambda x, d: torch.lerp(x, neighbour(x, d), 0.3),
    "difference": lambda x, d: torch.cat([first(x, d), x.diff(dim=d)], d),
    "doubled and cut": lambda x, d: torch.cat([x, x], d).narrow(d, 1, x.shape[d]),
    "repeated and cut": lambda x, d: x.repeat_interleave(2, d).narrow(d, 1, x.shape[d]),
    "padded": rows(lambda x: F.pad(x, (0, 0, 1, 0))[:-1] + x),
    "gram": rows(lambda x: (x @ x.t()).softmax(-1) @ x),
    "attention": rows(attention),
    "covariance": rows(lambda x: x @ (x.t() @ x) / x.shape[0]),
    "outer einsum": rows(lambda x: x * torch.einsum("bi,cj->", x, x).tanh()),
    "pairs einsum": rows(lambda x: torch.einsum("bi,ci,cj->bj", x, x, x)),
    "constant matrix": rows(lambda x: torch.ones(x.shape[0], x.shape[0], dtype=x.dtype).tril() @ x),
    "cdist": rows(lambda x: x * torch.cdist(x, x).mean(1, keepdim=True)),
    "differences of pairs": rows(lambda x: (x[:, None] - x[None]).abs().mean(1)),
    "cosine": rows(lambda x: x * F.cosine_similarity(x, x.roll(1, 0), dim=1)[:, None]),
    "transposed": transposed,
    "plus transpose": lambda x, d: (
        x + x.transpose(d, -1) if x.shape[d] == x.shape[-1] and d != x.dim() - 1 else transposed(x, d)
    ),
    "halves": lambda x, d: x - x.flatten().reshape(2, -1).mean(0).mean() if x.numel() % 2 == 0 else transposed(x, d),
    "index_add": lambda x, d: x.index_add(d, order(x, d), 0.5 * x),
    "index_copy": lambda x, d: torch.zeros_like(x).index_copy(d, order(x, d), x),
    "index_put": rows(lambda x: x.index_put((order(x, 0),), x.tanh(), accumulate=True)),
    "scatter": lambda x, d: torch.zeros_like(x).scatter(d, x.argsort(d), x),
    "scatter_add": lambda x, d: x.scatter_add(d, x.argsort(d), x),
    "scatter_reduce": lambda x, d: x.scatter_reduce(d, x.argsort(d).clamp(max=1), x, "amax"),
    "gather": lambda x, d: x.gather(d, x.argsort(d)),
    "take the largest": lambda x, d: x - x.gather(d, x.argmax(d, keepdim=True)),
    "own choice of sample": rows(lambda x: x[(x.sum(1) * 7).long() % x.shape[0]]),
    "select_scatter": lambda x, d: torch.select_scatter(x, x.select(d, 0), d, 1),
    "slice_scatter": lambda x, d: torch.slice_scatter(x, first(x, d) * 2, d, 1, 2),
    "rank": lambda x, d: x * x.argsort(d).argsort(d),
    "fft": lambda x, d: torch.fft.fft(x, dim=d).real,
    "convolution": rows(convolved),
    "resampled": rows(resampled),
    "as_strided": rows(strided),
    "unfold": rows(lambda x: torch.cat([x[:1], x.unfold(0, 2, 1).mean(-1)])),
    "recurrence": recurrence,
    "layer norm of all": lambda x, d: F.layer_norm(x, x.shape),
    "group norm, samples as channels": rows(lambda x: F.group_norm(x[None], 1)[0]),
    "instance norm over samples": rows(lambda x: F.instance_norm(x.t()[None])[0].t()),
    "fraction": lambda x, d: x * (x > 0).to(x.dtype).mean(d, keepdim=True),
    "any": lambda x, d: torch.where((x > 0.5).any(d, keepdim=True), x, 0.5 * x),
    "neighbour's sign": lambda x, d: torch.where(x.roll(1, d) > 0, x, 0.5 * x),
    "quantile": lambda x, d: x.masked_fill(x < x.median(), 0.0),
    "clamped by the mean": lambda x, d: torch.minimum(x, x.mean()),
    "bucketize": lambda x, d: x * torch.bucketize(x.contiguous(), x.flatten().sort().values),
    "detached mean": lambda x, d: x - x.detach().mean(d, keepdim=True),
    "detached scale": lambda x, d: x / (1 + x.detach().abs().amax()),
    "detached neighbour": lambda x, d: x * x.detach().roll(1, d),
    "only backward": only_backward,
    "upper triangle": rows(lambda x: x + (x @ x.t()).triu(1).sum(1, keepdim=True)),
    "kron": rows(lambda x: x * torch.kron(x[:1], x[1:2]).mean()),
    "solve": rows(lambda x: torch.linalg.solve_ex(x @ x.t() + torch.eye(x.shape[0], dtype=x.dtype), x).result),
    "place": rows(lambda x: x * (1 + torch.arange(x.shape[0]))[:, None]),
    "place in a table": rows(lambda x: x + torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)),
}

OTHERS: dict[str, Mixer] = {
    "flip": lambda x, d: x.flip(d),
    "roll": lambda x, d: x.roll(1, d),
    "permutation": lambda x, d: x.index_select(d, order(x, d)),
    "sort": lambda x, d: x.sort(d).values,
    "expanded first sample": lambda x, d: first(x, d).expand_as(x),
    "amax": lambda x, d: x.amax(d, keepdim=True).expand_as(x),
    "transposed": transposed,
    "doubled and cut": lambda x, d: torch.cat([x, x], d).narrow(d, 1, x.shape[d]),
}

WRAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": lambda x, mixed: mixed,
    "beside": lambda x, mixed: x + 0.1 * mixed,
    "gate": lambda x, mixed: x * mixed.sigmoid(),
    "hard gate": lambda x, mixed: torch.where(mixed > x, x, 0.5 * x),
    "detached": lambda x, mixed: x + mixed.detach().tanh(),
    "detached gate": lambda x, mixed: x * (mixed.detach() > 0),
}


def apply(x: Tensor, name: str, wrap: str, d: int) -> Tensor:
    """The value with one mixer in it."""
    if x.is_complex():  # which has no order: its parts have
        return torch.view_as_complex(OTHERS[name](torch.view_as_real(x.resolve_conj()), d).contiguous())
    if not x.is_floating_point():
        return OTHERS[name](x, d)
    return WRAPS[wrap](x, FLOATS[name](x, d))
