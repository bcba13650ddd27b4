"""Linear layers: every rank and layout of input, and inputs shared by several."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression, tagging


class InputByOutput(nn.Module):
    """The linear layer of GPT-2: weight [in, out], applied by addmm on flattened tokens."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.outputs)


class SwiGLU(nn.Module):
    """Two projections of one input, multiplied; as in Llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@register(equal=True)
def linear_2d(n: Sizes) -> Case:
    return regression(lambda: nn.Linear(n.width, n.out), floats(n.width), (n.out,))


@register()
def linear_2d_no_bias(n: Sizes) -> Case:
    return regression(lambda: nn.Linear(n.width, n.out, bias=False), floats(n.width), (n.out,))


@register(equal=True)
def linear_3d(n: Sizes) -> Case:
    return regression(lambda: nn.Linear(n.width, n.out), floats(n.time, n.width), (n.time, n.out))


@register()
def linear_3d_no_bias(n: Sizes) -> Case:
    return tagging(lambda: nn.Linear(n.width, n.vocab, bias=False), floats(n.time, n.width), n)


@register("peer", equal=True)
def linear_4d(n: Sizes) -> Case:
    return regression(lambda: nn.Linear(n.width, n.out), floats(n.time, 3, n.width), (n.time, 3, n.out))


@register()
def linear_one_output(n: Sizes) -> Case:
    return regression(lambda: nn.Linear(n.width, 1), floats(n.width), (1,))


@register(equal=True)
def linear_of_transpose(n: Sizes) -> Case:
    """The model transposes its input, so the linear sees a view that is not contiguous."""
    return regression(
        lambda: Model(lambda m, x: m.fc(x.transpose(1, 2)), fc=nn.Linear(n.time, n.out)),
        floats(n.time, n.width),
        (n.width, n.out),
    )


@register(equal=True)
def linear_of_strided_input(n: Sizes) -> Case:
    """The input itself arrives with the time axis outermost in memory."""
    return regression(
        lambda: nn.Linear(n.width, n.out),
        lambda size: (torch.randn(n.time, size, n.width).transpose(0, 1),),
        (n.time, n.out),
    )


@register()
def linear_of_every_other_feature(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: m.fc(x[..., ::2]), fc=nn.Linear(n.width // 2, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def linear_of_expanded_input(n: Sizes) -> Case:
    """Stride 0 along time: every token of a sample is the same memory."""
    return regression(
        lambda: Model(lambda m, x: m.fc(x[:, None].expand(-1, n.time, -1)), fc=nn.Linear(n.width, n.out)),
        floats(n.width),
        (n.time, n.out),
    )


@register()
def linear_of_flattened_sample(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(n.time * n.width, n.out)), floats(n.time, n.width), (n.out,)
    )


@register("peer")
def linear_called_by_keyword(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: m.fc(input=x), fc=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register(equal=True)
def linear_over_time(n: Sizes) -> Case:
    """The token-mixing half of an MLP mixer."""
    return regression(
        lambda: Model(lambda m, x: m.fc(x.mT).mT, fc=nn.Linear(n.time, n.out)),
        floats(n.time, n.width),
        (n.out, n.width),
    )


@register(equal=True)
def batch_in_the_last_dimension(n: Sizes) -> Case:
    """Inputs, outputs and targets are [d, T, B]."""
    return Case(
        build=lambda: Model(lambda m, x: m.fc(x.permute(2, 1, 0)).permute(2, 1, 0), fc=nn.Linear(n.width, n.out)),
        inputs=lambda size: (torch.randn(n.width, n.time, size),),
        targets=lambda size: torch.randn(n.out, n.time, size),
        loss=lambda output, target: (output - target).square().sum((0, 1)),
        batch_dim=2,
    )


@register(equal=True)
def input_by_output_weights(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(InputByOutput(n.width, n.hidden), nn.GELU(), InputByOutput(n.hidden, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register(equal=True)
def mlp(n: Sizes) -> Case:
    return tagging(
        lambda: nn.Sequential(nn.Linear(n.width, n.hidden), nn.GELU(), nn.Linear(n.hidden, n.vocab)),
        floats(n.time, n.width),
        n,
    )


@register("peer")
def mlp_with_in_place_activations(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(
            nn.Linear(n.width, n.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(n.hidden, n.hidden),
            nn.SiLU(inplace=True),
            nn.Linear(n.hidden, n.out),
        ),
        floats(n.width),
        (n.out,),
    )


@register(equal=True)
def query_key_value(n: Sizes) -> Case:
    """Three linears share one input, with and without bias."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.q(x).tanh() * m.k(x).sigmoid() + m.v(x)

    return regression(
        lambda: Model(
            forward, q=nn.Linear(n.width, n.out), k=nn.Linear(n.width, n.out), v=nn.Linear(n.width, n.out, bias=False)
        ),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def gated_linear_unit(n: Sizes) -> Case:
    """One half of the features gates the other; nn.GLU is an op of its own."""
    return regression(
        lambda: nn.Sequential(nn.Linear(n.width, 2 * n.out), nn.GLU()), floats(n.time, n.width), (n.time, n.out)
    )


@register(equal=True)
def gated_mlp(n: Sizes) -> Case:
    return regression(lambda: SwiGLU(n.width, n.hidden), floats(n.time, n.width), (n.time, n.width))


@register()
def residual_mlp(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = x + torch.tanh(layer(x))
        return x

    return regression(
        lambda: Model(forward, layers=nn.ModuleList(nn.Linear(n.width, n.width) for _ in range(3))),
        floats(n.time, n.width),
        (n.time, n.width),
    )


@register(equal=True)
def detached_input(n: Sizes) -> Case:
    """The input without its history, as of a frozen feature extractor, read once plainly and twice detached."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        features = m.first(x)
        return m.a(features.detach()) + torch.tanh(m.b(features.detach())) + features

    return regression(
        lambda: Model(
            forward, first=nn.Linear(n.width, n.width), a=nn.Linear(n.width, n.width), b=nn.Linear(n.width, n.width)
        ),
        floats(n.time, n.width),
        (n.time, n.width),
    )
