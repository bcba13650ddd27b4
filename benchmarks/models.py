"""The models that are timed: plain nn code, no dropout, the loss of each sample inside the module.

GPT and Llama take tokens [B, T] and targets [B, T], ViT takes images [B, 3, H, W] and classes [B]; all give losses [B].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values; x [B, T, width] -> the same."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))


class Block(nn.Module):
    """The transformer block of GPT-2 and ViT: norm, attention, norm, MLP of four times the width."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.norm_2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.fc2(F.gelu(self.fc(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with a head of its own. `batched_positions` looks positions up once for every sample: Opacus needs that
    (its issue 841), the gradient is the same."""

    def __init__(
        self, *, layers: int, heads: int, width: int, vocabulary: int, length: int, batched_positions: bool = False
    ) -> None:
        super().__init__()
        self.batched_positions = batched_positions
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(initialise)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.batched_positions:
            positions = positions.repeat(tokens.shape[0], 1)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return token_losses(self.head(self.norm(x)), targets)


class LlamaBlock(nn.Module):
    """RMSNorm, rotary attention with `groups` heads of keys and values, gated MLP; no biases."""

    def __init__(self, width: int, heads: int, mlp: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.norm_1 = nn.RMSNorm(width, eps=1e-5)
        narrow = width // heads * groups
        self.q, self.k, self.v, self.o = (nn.Linear(width, out, bias=False) for out in (width, narrow, narrow, width))
        self.norm_2 = nn.RMSNorm(width, eps=1e-5)
        self.gate, self.up = (nn.Linear(width, mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        q = split_heads(self.q(y), self.heads)
        k, v = (split_heads(layer(y), self.groups) for layer in (self.k, self.v))
        if self.groups < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        x = x + self.o(join_heads(F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """`groups` are the heads of keys and values, all by default. `tied`: the head's weight is that of the embedding.
    `checkpoint`: each block keeps its input alone for the backward."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        width: int,
        mlp: int,
        vocabulary: int,
        groups: int | None = None,
        tied: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, mlp, groups or heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.apply(initialise)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        return token_losses(self.head(self.norm(x)), targets)


class ClassToken(nn.Module):
    """Puts a learned token before the patches and adds learned positions; a module, so that it has gradient hooks."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, patches, width] -> [B, patches + 1, width]
        return torch.cat([self.token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1) + self.positions


class ViT(nn.Module):
    def __init__(self, *, layers: int, heads: int, width: int, image: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = ClassToken((image // patch) ** 2, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(initialise)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        x = self.class_token(self.patches(images).flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x[:, 0])), classes, reduction="none")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, width] -> [B, heads, T, width / heads]"""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, T, width / heads] -> [B, T, width]"""
    return x.transpose(1, 2).flatten(2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, "RoFormer"); x [B, heads, T, d] -> the same."""
    length, width = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [B, T, vocabulary], targets [B, T] -> the mean loss over each sample's tokens [B]."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
