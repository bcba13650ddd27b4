"""Loops over time: one weight used at every step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, map as map_over

from zoo.case import Case, Model, Sizes, register
from zoo.problems import classification, floats, regression, tagging, tokens


def unrolled(step: Callable[[nn.Module, Tensor, Tensor], Tensor], **parts: object) -> Model:
    """A model that runs `step(m, x_t, h) -> h` over [B, T, d] from h = 0 and gives all states [B, T, h]."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], m.size)
        states = []
        for t in range(x.shape[1]):
            h = step(m, x[:, t], h)
            states.append(h)
        return torch.stack(states, 1)

    return Model(forward, **parts)


@register("lookalike", equal=True)
def rnn_by_hand(n: Sizes) -> Case:
    return regression(
        lambda: unrolled(
            lambda m, x, h: torch.tanh(m.x(x) + m.h(h)), size=n.hidden, x=nn.Linear(n.width, n.hidden),
            h=nn.Linear(n.hidden, n.hidden, bias=False),
        ),
        floats(n.time, n.width),
        (n.time, n.hidden),
    )  # fmt: skip


@register()
def rnn_cell(n: Sizes) -> Case:
    return regression(
        lambda: unrolled(lambda m, x, h: m.cell(x, h), size=n.hidden, cell=nn.RNNCell(n.width, n.hidden)),
        floats(n.time, n.width),
        (n.time, n.hidden),
    )


@register()
def gru_cell(n: Sizes) -> Case:
    return regression(
        lambda: unrolled(lambda m, x, h: m.cell(x, h), size=n.hidden, cell=nn.GRUCell(n.width, n.hidden)),
        floats(n.time, n.width),
        (n.time, n.hidden),
    )


@register(equal=True)
def gru_by_hand(n: Sizes) -> Case:
    def step(m: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        reset, update = torch.sigmoid(m.gates(torch.cat([x, h], -1))).chunk(2, -1)
        candidate = torch.tanh(m.candidate(torch.cat([x, reset * h], -1)))
        return update * h + (1 - update) * candidate

    return regression(
        lambda: unrolled(
            step, size=n.hidden, gates=nn.Linear(n.width + n.hidden, 2 * n.hidden),
            candidate=nn.Linear(n.width + n.hidden, n.hidden),
        ),
        floats(n.time, n.width),
        (n.time, n.hidden),
    )  # fmt: skip


@register()
def lstm_language_model(n: Sizes) -> Case:
    def forward(m: nn.Module, ids: Tensor) -> Tensor:
        x = m.tokens(ids)
        state = (x.new_zeros(x.shape[0], n.width), x.new_zeros(x.shape[0], n.width))
        logits = []
        for t in range(n.time):
            state = m.cell(x[:, t], state)
            logits.append(state[0] @ m.tokens.weight.T)
        return torch.stack(logits, 1)

    return tagging(
        lambda: Model(forward, tokens=nn.Embedding(n.vocab, n.width), cell=nn.LSTMCell(n.width, n.width)),
        tokens(n.vocab, n.time),
        n,
    )


@register()
def learned_initial_state(n: Sizes) -> Case:
    """The first state is a parameter; the last state gives the classes."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.start.expand(x.shape[0], -1)
        for t in range(x.shape[1]):
            h = torch.tanh(m.step(torch.cat([x[:, t], h], 1)))
        return m.head(h)

    return classification(
        lambda: Model(
            forward, start=nn.Parameter(torch.zeros(n.hidden)), step=nn.Linear(n.width + n.hidden, n.hidden),
            head=nn.Linear(n.hidden, n.vocab),
        ),
        floats(n.time, n.width),
        n.vocab,
    )  # fmt: skip


@register(equal=True)
def gated_linear_scan(n: Sizes) -> Case:
    """A state-space layer: h_t = a_t h_(t-1) + b_t x_t by cumulative sums of logarithms."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        decay = -nn.functional.softplus(m.decay(x)).cumsum(1)
        return m.out(decay.exp() * (x * (-decay).exp()).cumsum(1))

    return regression(
        lambda: Model(forward, decay=nn.Linear(n.width, n.width), out=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def layer_mapped_over_steps(n: Sizes) -> Case:
    """`torch._higher_order_ops.map`: one op for the loop, and one for its backward."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        steps = map_over(lambda row, gate: m.fc(row).tanh() * gate, x.transpose(0, 1), m.gate)
        return steps.transpose(0, 1)

    return regression(
        lambda: Model(forward, fc=nn.Linear(n.width, n.out), gate=nn.Parameter(torch.rand(n.out))),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def associative_scan_of_gates(n: Sizes) -> Case:
    """A linear recurrence h_t = a_t h_(t-1) + b_t, by halving."""

    def joined(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        pair = (m.decay(x).sigmoid(), m.enter(x))
        return associative_scan(joined, pair, 1, combine_mode="generic")[1]

    return regression(
        lambda: Model(forward, decay=nn.Linear(n.width, n.out), enter=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )
