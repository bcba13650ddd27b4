"""Whole models in small: encoder layers, GPT, Llama, BERT, ViT, mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.attention import GroupedQueryAttention, SelfAttention
from zoo.case import Case, Model, Sizes, register
from zoo.embeddings import PatchesWithClassToken
from zoo.linears import InputByOutput, SwiGLU
from zoo.norms import HandWrittenRMSNorm
from zoo.problems import classification, floats, mask_of_lengths, regression, tagging, time_major_error, tokens


class Block(nn.Module):
    """A pre-norm transformer block; `recompute` wraps it in non-reentrant activation checkpointing."""

    def __init__(
        self, norm: type[nn.Module], attention: nn.Module, mlp: nn.Module, width: int, recompute: bool
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm(width), attention
        self.norm2, self.mlp = norm(width), mlp
        self.recompute = recompute

    def body(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)


class GPT(nn.Module):
    """Token and position tables, blocks, a final norm, and a head tied to the token table."""

    def __init__(self, n: Sizes, blocks: int = 1, tied: bool = True, recompute: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n.vocab, n.width)
        self.positions = nn.Embedding(n.time, n.width)
        self.blocks = nn.ModuleList(
            Block(
                nn.LayerNorm,
                SelfAttention(n.width, n.heads),
                nn.Sequential(InputByOutput(n.width, n.hidden), nn.GELU(), InputByOutput(n.hidden, n.width)),
                n.width,
                recompute,
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(n.width)
        self.head = nn.Linear(n.width, n.vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Llama(nn.Module):
    """Rotary grouped-query attention, gated MLP, RMS norms written by hand, untied head."""

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n.vocab, n.width)
        self.block = Block(
            HandWrittenRMSNorm, GroupedQueryAttention(n.width, n.heads), SwiGLU(n.width, n.hidden), n.width, False
        )
        self.norm = HandWrittenRMSNorm(n.width)
        self.head = nn.Linear(n.width, n.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.tokens(ids))))


class VisionTransformer(nn.Module):
    """Patches by convolution, class token, positions, one encoder layer, classes from the class token."""

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, n.width, 2, stride=2)
        self.front = PatchesWithClassToken(4, n.width)
        self.encoder = nn.TransformerEncoderLayer(
            n.width, n.heads, n.hidden, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(n.width)
        self.head = nn.Linear(n.width, n.vocab)

    def forward(self, images: Tensor) -> Tensor:
        x = self.front(self.patch(images).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.encoder(x))[:, 0])


@register("lookalike", equal=True)
def encoder_layer(n: Sizes) -> Case:
    return regression(
        lambda: nn.TransformerEncoderLayer(n.width, n.heads, n.hidden, 0.0, batch_first=True),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register(equal=True)
def encoder_layer_time_major(n: Sizes) -> Case:
    return Case(
        build=lambda: nn.TransformerEncoderLayer(n.width, n.heads, n.hidden, 0.0, "gelu", norm_first=True),
        inputs=lambda size: (torch.randn(n.time, size, n.width),),
        targets=lambda size: torch.randn(n.time, size, n.width),
        loss=time_major_error,
        batch_dim=1,
    )


@register("lookalike", equal=True)
def gpt(n: Sizes) -> Case:
    return tagging(
        lambda: GPT(n),
        tokens(n.vocab, n.time),
        n,
        groups={"*tokens.weight": "tables", "*positions.weight": "tables", "*blocks.0.*": "block", "*": "rest"},
    )


@register()
def gpt_two_blocks_checkpointed(n: Sizes) -> Case:
    """Identical blocks, so that compiled code could be shared between them; untied head."""
    return tagging(
        lambda: GPT(n, blocks=2, tied=False, recompute=True),
        tokens(n.vocab, n.time),
        n,
        groups={"*blocks.0.*": "first", "*blocks.1.*": "second", "*": "rest"},
    )


@register()
def llama(n: Sizes) -> Case:
    return tagging(lambda: Llama(n), tokens(n.vocab, n.time), n)


@register(equal=True)
def vision_transformer(n: Sizes) -> Case:
    return classification(lambda: VisionTransformer(n), floats(1, 4, 4), n.vocab)


@register(equal=True)
def mlp_mixer(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = x + m.over_time(m.norm1(x).mT).mT
        return m.head((x + m.over_width(m.norm2(x))).tanh().mean(1))

    return classification(
        lambda: Model(
            forward, norm1=nn.LayerNorm(n.width), over_time=nn.Sequential(nn.Linear(n.time, n.hidden), nn.GELU(),
            nn.Linear(n.hidden, n.time)), norm2=nn.LayerNorm(n.width), over_width=nn.Linear(n.width, n.width),
            head=nn.Linear(n.width, n.vocab),
        ),
        floats(n.time, n.width),
        n.vocab,
    )  # fmt: skip


@register("lookalike", equal=True)
def text_classifier(n: Sizes) -> Case:
    """BERT in small: tokens, segments, positions, attention with padding, mean over real tokens, keyword inputs."""

    def forward(m: nn.Module, *, input_ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        x = m.tokens(input_ids) + m.segments(segments) + m.positions(torch.arange(n.time, device=input_ids.device))
        x = m.norm(x)
        x = x + m.attention(x, attention_mask[:, None, None, :].bool())
        weight = attention_mask.to(x.dtype)[..., None]
        return m.head(torch.tanh((x * weight).sum(1) / weight.sum(1)))

    def inputs(size: int) -> dict[str, Tensor]:
        mask = mask_of_lengths(size, n.time)
        return {
            "input_ids": torch.randint(1, n.vocab, (size, n.time)) * mask,
            "segments": torch.randint(0, 2, (size, n.time)),
            "attention_mask": mask.long(),
        }

    return classification(
        lambda: Model(
            forward, tokens=nn.Embedding(n.vocab, n.width, padding_idx=0), segments=nn.Embedding(2, n.width),
            positions=nn.Embedding(n.time, n.width), norm=nn.LayerNorm(n.width),
            attention=SelfAttention(n.width, n.heads), head=nn.Linear(n.width, n.vocab),
        ),
        inputs,
        n.vocab,
    )  # fmt: skip


@register("peer", equal=True)
def lora_on_a_frozen_gpt(n: Sizes) -> Case:
    """Everything frozen but low-rank products beside the head and the queries."""

    def forward(m: nn.Module, ids: Tensor) -> Tensor:
        x = m.base.tokens(ids)
        for block in m.base.blocks:
            x = block(x) + x @ m.a.T @ m.b.T
        return m.base.head(m.base.norm(x))

    return tagging(
        lambda: Model(
            forward, base=GPT(n).requires_grad_(False), a=nn.Parameter(torch.randn(2, n.width)),
            b=nn.Parameter(torch.zeros(n.width, 2)),
        ),
        tokens(n.vocab, n.time),
        n,
    )  # fmt: skip


@register()
def checkpointed_mlp(n: Sizes) -> Case:
    return regression(
        lambda: Model(
            lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
            body=nn.Sequential(nn.Linear(n.width, n.hidden), nn.GELU(), nn.Linear(n.hidden, n.width)),
            head=nn.Linear(n.width, n.out),
        ),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def sliding_window_attention(n: Sizes) -> Case:
    """Local attention by windows of two tokens: the window is merged with the batch."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        size, time, width = x.shape
        windows = m.qkv(x).reshape(size * time // 2, 2, 3 * width)
        q, k, v = windows.chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).reshape(size, time, width)

    return regression(
        lambda: Model(forward, qkv=nn.Linear(n.width, 3 * n.width)), floats(n.time, n.width), (n.time, n.width)
    )
