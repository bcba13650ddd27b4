"""One weight in several places, and weights that do not train."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression, several, tagging, tokens


class TiedLanguageModel(nn.Module):
    """Embedding, a hidden layer, and a head that shares the embedding's weight."""

    def __init__(self, vocab: int, width: int, bias: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=bias)
        self.head.weight = self.tokens.weight
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.scale * self.tokens(ids))))


class LoRA(nn.Module):
    """A frozen linear plus a trainable product of low rank."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def frozen(module: nn.Module) -> nn.Module:
    """The module with no parameter to train."""
    return module.requires_grad_(False)


def without_gradient(module: nn.Module, *names: str) -> nn.Module:
    """The module with the named parameters frozen."""
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


@register("peer", equal=True)
def weight_used_twice(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=nn.Linear(n.width, n.width)),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register("peer")
def weight_used_on_different_lengths(n: Sizes) -> Case:
    """Three uses with 4, 3 and 1 tokens."""
    return regression(
        lambda: Model(
            lambda m, x: torch.cat([m.fc(x), m.fc(x[:, 1:].tanh()), m.fc(x.mean(1, keepdim=True))], 1),
            fc=nn.Linear(n.width, n.out),
        ),
        floats(n.time, n.width),
        (2 * n.time, n.out),
    )


@register(equal=True)
def tied_autoencoder(n: Sizes) -> Case:
    """The decoder's weight is the encoder's, transposed."""
    return regression(
        lambda: Model(lambda m, x: F.linear(torch.tanh(m.encode(x)), m.encode.weight.T, m.bias),
                      encode=nn.Linear(n.width, n.hidden), bias=nn.Parameter(torch.zeros(n.width))),
        floats(n.time, n.width),
        (n.time, n.width),
    )  # fmt: skip


@register()
def weight_times_its_transpose(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: x @ (m.w @ m.w.T), w=nn.Parameter(torch.randn(n.width, 3))),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register(equal=True)
def two_towers_one_weight(n: Sizes) -> Case:
    """A siamese model: one encoder, two inputs of one sample."""
    return regression(
        lambda: Model(lambda m, a, b: m.encode(a).tanh() * m.encode(b), encode=nn.Linear(n.width, n.out)),
        several(floats(n.width), floats(n.width)),
        (n.out,),
    )


@register("peer", equal=True)
def tied_embedding_and_head(n: Sizes) -> Case:
    return tagging(lambda: TiedLanguageModel(n.vocab, n.width), tokens(n.vocab, n.time), n)


@register("peer")
def tied_embedding_and_head_repeated_ids(n: Sizes) -> Case:
    """Targets and inputs share few ids, so the cross term of the norm is large."""
    return Case(
        build=lambda: TiedLanguageModel(n.vocab, n.width),
        inputs=tokens(2, n.time),
        targets=lambda size: torch.randint(0, 2, (size, n.time)),
        loss=tagging(nn.Module, tokens(2), n).loss,
    )


@register()
def tied_embedding_scaled_with_head_bias(n: Sizes) -> Case:
    return tagging(lambda: TiedLanguageModel(n.vocab, n.width, bias=True, scale=2.5), tokens(n.vocab, n.time), n)


@register()
def tied_embedding_with_padding(n: Sizes) -> Case:
    """The padding row gets nothing from the lookup and everything from the head."""

    def build() -> nn.Module:
        model = TiedLanguageModel(n.vocab, n.width)
        model.tokens.padding_idx = 0
        return model

    return tagging(build, tokens(3, n.time), n)


@register()
def tied_embedding_with_projection(n: Sizes) -> Case:
    """The head multiplies by the table and a projection, as ALBERT does."""
    return tagging(
        lambda: Model(
            lambda m, ids: m.down(m.up(m.tokens(ids)).tanh()) @ m.tokens.weight.T,
            tokens=nn.Embedding(n.vocab, n.width),
            up=nn.Linear(n.width, n.hidden),
            down=nn.Linear(n.hidden, n.width),
        ),
        tokens(n.vocab, n.time),
        n,
    )


@register(equal=True)
def tied_embedding_read_twice(n: Sizes) -> Case:
    """The table is read by two inputs and is the head too: three uses, one gradient."""
    return tagging(
        lambda: Model(
            lambda m, a, b: (m.tokens(a).tanh() + m.tokens(b)) @ m.tokens.weight.T,
            tokens=nn.Embedding(n.vocab, n.width),
        ),
        several(tokens(n.vocab, n.time), tokens(n.vocab, n.time)),
        n,
    )


@register("peer")
def head_registered_first(n: Sizes) -> Case:
    return regression(
        lambda: Model(
            lambda m, x: m.head(m.body(x).relu()), head=nn.Linear(n.hidden, n.out), body=nn.Linear(n.width, n.hidden)
        ),
        floats(n.width),
        (n.out,),
    )


@register()
def first_layer_frozen(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(frozen(nn.Linear(n.width, n.hidden)), nn.GELU(), nn.Linear(n.hidden, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def last_layer_frozen(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Linear(n.width, n.hidden), nn.LayerNorm(n.hidden), frozen(nn.Linear(n.hidden, n.out))),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register("peer", equal=True)
def only_biases_train(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(
            without_gradient(nn.Linear(n.width, n.hidden), "weight"), nn.GELU(),
            without_gradient(nn.LayerNorm(n.hidden), "weight"), without_gradient(nn.Linear(n.hidden, n.out), "weight"),
        ),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register()
def frozen_bias(n: Sizes) -> Case:
    return regression(
        lambda: without_gradient(nn.Linear(n.width, n.out), "bias"), floats(n.time, n.width), (n.time, n.out)
    )


@register()
def frozen_embedding_trained_norm(n: Sizes) -> Case:
    return tagging(
        lambda: nn.Sequential(
            frozen(nn.Embedding(n.vocab, n.width)), nn.LayerNorm(n.width), frozen(nn.Linear(n.width, n.vocab))
        ),
        tokens(n.vocab, n.time),
        n,
    )


@register("peer", equal=True)
def lora(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(LoRA(n.width, n.hidden), nn.GELU(), LoRA(n.hidden, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def lora_merged_before_use(n: Sizes) -> Case:
    """x (W + A B): the gradient of the merged weight is mapped on to A and B."""
    return regression(
        lambda: Model(lambda m, x: x @ (m.base + m.a @ m.b), base=torch.randn(n.width, n.out),
                      a=nn.Parameter(torch.randn(n.width, 2)), b=nn.Parameter(torch.randn(2, n.out))),
        floats(n.time, n.width),
        (n.time, n.out),
    )  # fmt: skip


@register("peer", "idle")
def one_layer_is_idle(n: Sizes) -> Case:
    """A trainable layer that this step does not use."""
    return regression(
        lambda: Model(lambda m, x: m.used(x), idle=nn.Linear(n.width, n.width), used=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register("idle")
def one_output_is_not_in_the_loss(n: Sizes) -> Case:
    """The second head is computed and returned, and the loss ignores it."""
    return Case(
        build=lambda: Model(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(n.width, n.out), b=nn.Linear(n.width, n.out)),
        inputs=floats(n.width),
        targets=lambda size: torch.randn(size, n.out),
        loss=lambda outputs, target: (outputs[0] - target).square().sum(1),
    )


@register()
def gradient_stopped_on_one_path(n: Sizes) -> Case:
    """A student follows a detached teacher that shares its weight."""
    return regression(
        lambda: Model(lambda m, x: m.fc(x) * m.fc(x.flip(1)).detach().tanh(), fc=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )
