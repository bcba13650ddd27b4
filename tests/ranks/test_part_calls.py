"""Ways around the graph of a part of a sharded model: each is refused, and nothing is released."""

from __future__ import annotations

import torch
from torch import nn

from engine.runs import samples
from ranks.runs import same, text_of
from ranks.sharded import full, setup


class Part(nn.Module):
    """`code(part, its result, what it was called with, ...)` is what it returns."""

    def __init__(self, code=None, frozen=False):
        super().__init__()
        self.inner, self.code = nn.Linear(3, 3), code
        self.register_buffer("memo", torch.ones(8, 3))
        self.requires_grad_(not frozen)

    def forward(self, x, *more):
        y = self.inner(x)
        return y if self.code is None else self.code(self, y, x, *more)


class Net(nn.Module):
    """`forward_of(net, x)` calls its parts, `first` and `second`."""

    def __init__(self, first=None, second=None, forward_of=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = first or Part(), second or Part()
        self.forward_of = forward_of or (lambda net, x: net.second(net.first(x)))

    def forward(self, x):
        return self.forward_of(self, x)

    def parts(self):
        return [self.first, self.second]


def loss_of(out):
    return out.square().sum(1).mean()


def stepped(net, loss=loss_of, times=1, **settings):
    """So many steps, without clearing anything."""
    its, net, called, optimizer = setup(net, noise_multiplier=1.0, **settings)
    start = full(net)
    try:
        for _ in range(times):
            loss(called(samples().to(start[0].dtype))).backward()
            optimizer.step()
    finally:
        assert its.steps_done == times or its.steps_done == times - 1 and (times > 1 or same(start, full(net)))


def narrow():
    stepped(Net().bfloat16(), lambda out: loss_of(out.float()))


CASES = {
    narrow: "to which fully_shard would round clipped sums",
}


def attempted(rank, size):
    return {case.__name__: text_of(case) for case in CASES}


def test_ways_around(pool):
    (said,) = pool.run(1, attempted)
    wrong = {
        case.__name__: said[case.__name__] for case, text in CASES.items() if text not in (said[case.__name__] or "")
    }
    assert wrong == {}
