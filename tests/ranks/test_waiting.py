"""What one rank refuses in the forward of a sharded model is said to those that wait for it."""

import time

import torch

from engine.runs import engine
from ranks.runs import backward, share, text_of
from ranks.sharded import Net, shard

WAIT = 4.0  # seconds


class Mixing(Net):
    """Mixes samples between two parts, on one rank."""

    on = False

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + x.mean(0) if self.on else x)


def waited(rank, size):
    its, net = engine(clipping="per_block"), Mixing()
    called = its.compile(shard(net))
    optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=1.0))
    backward(called, share(rank, size))
    optimizer.step()
    start, begun = [p.to_local().clone() for p in net.parameters()], time.monotonic()
    net.on = rank == 0
    said = text_of(lambda: backward(called, share(rank, size)))
    took = time.monotonic() - begun
    time.sleep(max(0.0, 2 * WAIT - took))  # this process lives on
    moved = any(not torch.equal(a, p.to_local()) for a, p in zip(start, net.parameters(), strict=True))
    return said, took, moved, its.steps_done


def test_others_are_told_why_they_have_waited(pool):
    (refused, at_once, *one), (told, took, *other) = pool.outcomes(2, waited, wait=WAIT)
    assert "aten.mean.dim is called" in refused and at_once < WAIT / 2
    assert "waited in vain" in told and f"rank 0: Refusal: {refused[:20]}" in told and "from a checkpoint" in told
    assert took < 2 * WAIT and one == other == [False, 1]
