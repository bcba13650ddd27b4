"""Norms that are estimated, in parts of a sharded model: the same probes on all ranks, and in each part its own."""

from unittest import mock

import torch
from torch import nn

from engine.runs import BATCH, engine
from flashdp_compile import accounting
from flashdp_compile.runtime.probe_keys import HeldProbes
from ranks.runs import close, share
from ranks.sharded import shard

WIDTH, CPU = 96, torch.device("cpu")


class Wide(nn.Module):
    """Layers so wide that they are estimated, two of them of one class and shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        return self.head(self.blocks[1](self.blocks[0](self.first(x))))

    def parts(self):
        return [self.first, *self.blocks, self.head]


def gradients(rank, size, norm, micro_batches, clipping="per_block"):
    """The gradients of a step without noise. No part of a batch is a single sample."""
    net = Wide()
    options = {"norm": norm, "probes": 16, "compiler": "eager"} if norm else {"compiler": "eager"}
    its = engine(
        clipping=clipping,
        options=options,
        groups=4 if norm else None,
        sampling=accounting.Poisson(0.1, 10 * BATCH),
        micro_batches=micro_batches,
        max_grad_norm=0.01,
        seed=3,
    )
    called = its.compile(shard(net))
    optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=1.0))
    for rows in share(rank, size).chunk(micro_batches):
        called(rows).square().sum(1).mean().backward()
        optimizer.step()
    assert its.stepped
    return [p.grad.full_tensor() for p in net.parameters()]


def test_all_ranks_and_cuts_have_the_same_probes(pool):
    (alone,) = pool.run(1, gradients, "hutchinson", 1)
    (exact,) = pool.run(1, gradients, None, 1)
    assert not close(alone, exact, 1e-2)
    for found in pool.run(2, gradients, "hutchinson", 2):
        assert close(found, alone)


def test_each_part_has_probes_of_its_own():
    held = HeldProbes("hutchinson", 16, 4, seed=1)
    keys = []
    for held.part in (None, 0, 1, 0):
        keys.append(tuple(held.key(CPU).tolist()))
    assert len(set(keys)) == 3 and keys[1] == keys[3]
    held.move()
    later = tuple(held.key(CPU).tolist())
    assert later[0] == keys[1][0] and later[1] == keys[1][1] + 1


def drawn(rank, size):
    """The keys that a backward has drawn."""
    found, key = [], HeldProbes.key

    def noted(held, device):
        found.append(tuple(key(held, device).tolist()))
        return key(held, device)

    with mock.patch.object(HeldProbes, "key", noted):
        gradients(rank, size, "hutchinson", 1)
    return found


def test_parts_of_one_class_draw_other_probes(pool):
    (found,) = pool.run(1, drawn)
    assert len(found) == len(set(found)) == 2
