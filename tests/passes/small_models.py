"""Models small enough to check a table of them by hand."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo import Model


class Conv1D(nn.Module):
    """The linear layer of Hugging Face's GPT-2: the weight is [in, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Block(nn.Module):
    """LayerNorm, a linear layer without bias, another one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8, bias=False), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tied(nn.Module):
    """Token and position tables; the head reads the token table again."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Parameter(torch.randn(4, 6))

    def forward(self, ids):
        h = self.tokens(ids) + self.positions
        return F.linear(torch.tanh(h), self.tokens.weight)


class TimeMajorAttention(nn.Module):
    """Tokens first, samples second, as nn.MultiheadAttention takes them by default; q, k, v from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, bias=False)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class TwoStreams(nn.Module):
    """Two views of every sample are joined along the batch dimension, so that it has an outer factor of two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x, y):
        left, right = self.fc(torch.cat([x, y])).chunk(2)
        return left * right


def twice() -> nn.Module:
    return Model(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=nn.Linear(6, 6))


def padded() -> nn.Module:
    return Model(lambda m, ids: m.table(ids), table=nn.Embedding(11, 6, padding_idx=0))


def convolution() -> nn.Module:
    return Model(lambda m, x: m.conv(x), conv=nn.Conv2d(2, 3, 3))
