"""Plain training code without a library: a GPT of two hundred lines, and a Llama with complex rotary positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libraries.whole import Task, Whole
from zoo.problems import token_cross_entropy

VOCAB, TIME, WIDTH, HEADS = 97, 9, 32, 4


class Norm(nn.Module):
    """A layer norm whose bias may be left out."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalAttention(nn.Module):
    """Queries, keys and values by one layer; scores written out, under a mask that is a buffer, if `by_hand`."""

    def __init__(self, bias: bool, dropout: float, by_hand: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.dropout, self.by_hand = dropout, by_hand
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("past", torch.ones(2 * TIME, 2 * TIME).tril().view(1, 1, 2 * TIME, 2 * TIME))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in (q, k, v))
        if self.by_hand:
            scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
            scores = scores.masked_fill(self.past[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(scores, dim=-1)) @ v
        else:
            dropped = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class GPTBlock(nn.Module):
    def __init__(self, bias: bool, dropout: float, by_hand: bool) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = Norm(bias), CausalAttention(bias, dropout, by_hand), Norm(bias)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH, bias=bias), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH, bias=bias),
            nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position tables, two blocks, and a head tied to the tokens."""

    def __init__(self, dropout: float = 0.1, bias: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(2 * TIME, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(GPTBlock(bias, dropout, by_hand) for _ in range(2)),
                "ln_f": Norm(bias),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        positions = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def rotations(size: int, length: int) -> Tensor:
    """The complex numbers that turn pairs of features, [T, size / 2]."""
    frequencies = 1.0 / 500.0 ** (torch.arange(0, size, 2)[: size // 2].float() / size)
    angles = torch.outer(torch.arange(length), frequencies).float()
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """[B, T, heads, size] by turns [T, size / 2]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turns = turns[: x.shape[1]].view(1, x.shape[1], 1, pairs.shape[-1])
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


class LlamaBlock(nn.Module):
    """Grouped queries whose keys and values are repeated by expand, and a gated MLP."""

    def __init__(self, shared: int, hidden: int) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.size, self.repeats = size, HEADS // shared
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = nn.Linear(WIDTH, shared * size, bias=False), nn.Linear(WIDTH, shared * size, bias=False)
        self.w1, self.w3 = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(WIDTH, hidden, bias=False)
        self.w2 = nn.Linear(hidden, WIDTH, bias=False)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def attention(self, x: Tensor, turns: Tensor) -> Tensor:
        bs, seqlen, _ = x.shape
        q, k, v = (layer(x).view(bs, seqlen, -1, self.size) for layer in (self.wq, self.wk, self.wv))
        q, k = rotated(q, turns), rotated(k, turns)
        k, v = (
            t[:, :, :, None, :].expand(-1, -1, -1, self.repeats, -1).reshape(bs, seqlen, -1, self.size) for t in (k, v)
        )
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.wo(y.transpose(1, 2).contiguous().view(bs, seqlen, -1))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), turns)
        gated = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(gated)) * self.w3(gated))


class Llama(nn.Module):
    """Layers in a dict by number, positions as a complex buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.register_buffer("freqs_cis", rotations(WIDTH // HEADS, 2 * TIME), persistent=False)
        self.layers = nn.ModuleDict({str(n): LlamaBlock(2, 48) for n in range(2)})
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, self.freqs_cis)
        return self.output(self.norm(h))


def ids(size: int) -> Tensor:
    return torch.randint(0, VOCAB, (size, TIME))


TOKENS = Task(ids, token_cross_entropy)
MODELS = {
    "plain_gpt": Whole("GPT as in nanoGPT", "", GPT, lambda size: (ids(size),), TOKENS, {"dropout": 0.0}),
    "plain_gpt_by_hand": Whole(
        "GPT as in nanoGPT, attention written out, with biases",
        "",
        lambda **more: GPT(bias=True, by_hand=True, **more),
        lambda size: (ids(size),),
        TOKENS,
        {"dropout": 0.0},
    ),
    "plain_llama": Whole(
        "Llama as in torchtitan, complex rotary positions", "", Llama, lambda size: (ids(size),), TOKENS
    ),
}
