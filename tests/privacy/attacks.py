"""Models whose per-sample gradients a caller shapes freely, and inputs that are chosen to break a bound.

Every model maps (x [B, T, 4], ids [B, T]) to an output, and a sample's loss is the sum of output * coefficients: so x
and the coefficients are the very operands of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import Model

WIDTH, OUT, VOCAB = 4, 3, 7


def _attention(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the width of what each gives
    "linear": (lambda: Model(lambda m, x, ids: m.a(x), a=nn.Linear(WIDTH, OUT)), OUT),
    "embedding": (lambda: Model(lambda m, x, ids: m.e(ids), e=nn.Embedding(VOCAB, OUT)), OUT),
    "tied": (lambda: Model(lambda m, x, ids: (m.e(ids) + x) @ m.e.weight.T, e=nn.Embedding(VOCAB, WIDTH)), VOCAB),
    "norm": (lambda: Model(lambda m, x, ids: m.n(x), n=nn.LayerNorm(WIDTH)), WIDTH),
    "conv": (lambda: Model(lambda m, x, ids: m.c(x.mT).mT, c=nn.Conv1d(WIDTH, OUT, 3, padding=1)), OUT),
    "attention": (lambda: Model(_attention, qkv=nn.Linear(WIDTH, 3 * WIDTH), out=nn.Linear(WIDTH, OUT)), OUT),
    "twice": (lambda: Model(lambda m, x, ids: m.a(m.a(x)), a=nn.Linear(WIDTH, WIDTH)), WIDTH),
    "deep": (
        lambda: Model(
            lambda m, x, ids: m.c(m.b(m.e(ids) + x).tanh()),
            e=nn.Embedding(VOCAB, WIDTH),
            b=nn.Linear(WIDTH, WIDTH),
            c=nn.Linear(WIDTH, OUT, bias=False),
        ),
        OUT,
    ),
}


@dataclass(frozen=True)
class Attack:
    """`scale` multiplies the model's initial parameters."""

    name: str
    x: Tensor
    ids: Tensor
    coefficients: Tensor
    scale: float = 1.0


def attacks(batch: int, width: int, time: int = 6) -> Iterator[Attack]:
    """Scales from 1e-6 to 1e6, mixtures of them, and tokens that are equal or cancel; reproducible."""
    g = torch.Generator().manual_seed(batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def wild(*shape: int) -> Tensor:
        return normal(*shape) * 10 ** (12 * torch.rand(shape, generator=g) - 6)

    ids = torch.randint(0, VOCAB, (batch, time), generator=g)
    one_id = ids[:, :1].expand_as(ids).contiguous()
    x, c = normal(batch, time, WIDTH), normal(batch, time, width)
    for sx, sc, sw in ((1, 1, 1), (1e6, 1e6, 1), (1e-6, 1e-6, 1), (1e6, 1e-6, 1), (1e-6, 1e6, 1), (1e3, 1e3, 1e6)):
        yield Attack(f"scales {sx:g} {sc:g} {sw:g}", sx * x, ids, sc * c, sw)
    yield Attack("everything tiny", 1e-6 * x, ids, 1e-6 * c, 1e-6)
    yield Attack("every element of its own scale", wild(*x.shape), ids, wild(*c.shape))
    per_token = 10.0 ** torch.tensor([6, -6, 3, -3, 0, 6])[:, None]
    yield Attack("every token of its own scale", x * per_token, ids, c * per_token.flip(0))
    same_x, same_c = x[:, :1].expand_as(x), c[:, :1].expand_as(c)
    yield Attack("equal tokens", same_x.contiguous(), one_id, same_c.contiguous())
    sign = torch.tensor([1.0, -1.0]).repeat(time // 2)[:, None]
    for scale in (1.0, 1e6):
        yield Attack(f"tokens that cancel, times {scale:g}", scale * same_x, one_id, scale * same_c * sign)
        nearly = same_c * sign + 1e-6 * c
        yield Attack(f"tokens that nearly cancel, times {scale:g}", scale * same_x, one_id, scale * nearly)
        drift = same_c * torch.linspace(1, 1.001, time)[:, None] * sign
        yield Attack(f"tokens that drift apart, times {scale:g}", scale * same_x, one_id, scale * drift)
