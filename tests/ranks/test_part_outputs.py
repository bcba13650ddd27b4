"""What one part of a sharded model may hand to the next: a row for each sample, by a frozen part too."""

from __future__ import annotations

import torch
from torch import nn

from ranks.runs import text_of
from ranks.sharded import setup


class Giving(nn.Module):
    """A part that returns `given(its result, what it was called with)`."""

    def __init__(self, given):
        super().__init__()
        self.inner, self.given = nn.Linear(3, 3), given
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        return self.given(self, self.inner(x), x)


class Pair(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.first, self.second = Giving(given), nn.Linear(3, 3)

    def forward(self, x):
        found = self.first(x)
        return self.second(found[-1] if isinstance(found, tuple) else found)

    def parts(self):
        return [self.first, self.second]


def remember(part, y, x):
    part.mean.copy_(y.mean((0, 1)))
    return y


OTHERWISE = "holds its samples otherwise"
GIVEN = {  # by a part, which may be frozen, for samples that are as many as each has rows
    "rows first": (False, lambda part, y, x: y.transpose(0, 1), OTHERWISE),
    "rows and samples": (False, lambda part, y, x: y.flatten(0, 1), OTHERWISE),
    "a view of what it was given": (False, lambda part, y, x: (y, x.transpose(0, 1)), OTHERWISE),
    "a sum": (False, lambda part, y, x: (y, y.detach().sum(0)), OTHERWISE),
    "frozen, rows first": (True, lambda part, y, x: y.transpose(0, 1), OTHERWISE),
    "frozen, centred": (True, lambda part, y, x: y - y.mean(0), "a value computed from the whole batch"),
    "frozen, remembering": (True, remember, "mean is updated from the samples"),
    "frozen, each alone": (True, lambda part, y, x: y.tanh(), None),
}


def given_on(frozen, code, count=8):
    net = Pair(code)
    net.first.requires_grad_(not frozen)
    its, net, called, optimizer = setup(net, noise_multiplier=1.0)
    called(torch.ones(count, 8, 3)).sum((1, 2)).mean().backward()
    optimizer.step()
    assert its.steps_done == 1


def attempted(rank, size):
    """What each of these says."""
    return {name: text_of(lambda f=frozen, c=code: given_on(f, c)) for name, (frozen, code, _) in GIVEN.items()}


def test_what_is_handed_on(pool):
    (said,) = pool.run(1, attempted)
    for name, (_, _, text) in GIVEN.items():
        assert said[name] is None if text is None else text in (said[name] or ""), (name, said[name])


def alone(rank, size):
    """A batch of one sample, whose rows come first: each would be a sample to the next part."""
    return text_of(lambda: given_on(False, lambda part, y, x: y.transpose(0, 1), count=1))


def test_a_single_sample_is_not_taken_apart(pool):
    (said,) = pool.run(1, alone)
    assert "has other rows than samples" in said
