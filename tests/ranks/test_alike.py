"""What ranks must have alike: it is compared before anything is added up of what does not belong together."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from engine.runs import engine, mlp, samples
from ranks import sharded
from ranks.runs import backward, close, copies, expected, moved, same, setup, share, text_of


def fewer_ranks(rank):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("each", "alone"))["alone"]
    engine(clipping="per_block").compile(sharded.shard(sharded.Net(), mesh=mesh))


def frozen_otherwise(rank):
    """What is left is not of the same size: fully_shard's reduction would end the process."""
    net = sharded.Net()
    (net.first if rank else net.head).requires_grad_(False)
    sharded.setup(net)


def frozen_later(rank):
    """A parameter on each rank, of the same size: what is left of their gradients would be added up."""
    its, net, called, optimizer = sharded.setup(way="whole")
    net.blocks[rank].up.bias.requires_grad_(False)
    sharded.steps(called, optimizer, samples(), 1)


def other_shape(rank):
    net = sharded.Net()
    net.blocks[0] = sharded.Block(inner=7 + rank)
    sharded.setup(net)


def other_clipping(rank):
    sharded.setup(clipping=("per_block", "per_layer")[rank])


def other_copies(rank):
    """Copies of shards, of which one begins with other weights."""
    net = sharded.Net()
    with torch.no_grad():
        net.blocks[1].up.bias += 1e-3 * rank
    its, net, called, optimizer = sharded.setup(net, "hybrid", noise_multiplier=1.0)
    start = sharded.full(net)
    try:
        sharded.steps(called, optimizer, samples(), 1)
    finally:
        assert its.steps_done == 0 and same(start, sharded.full(net))


CASES = {
    fewer_ranks: "is not sharded over all 2 ranks",
    frozen_otherwise: "ranks do not agree. rank 0: the parameters of the sharded model: first.weight='[5, 3] of",
    frozen_later: "was frozen behind engine.compile",
    other_shape: "blocks.0.up.weight='[8, 5] of",
    other_clipping: "ranks do not agree",
    other_copies: "ranks 0 and 1 do not agree: other values of the elements of blocks.1.up.bias from 0 on",
}


def on_two_ranks(rank, size):
    return [text_of(lambda case=case: case(rank)) for case in CASES]


def test_what_two_ranks_do_otherwise(pool):
    for texts in pool.run(2, on_two_ranks):
        for text, wanted in zip(texts, CASES.values(), strict=True):
            assert text is not None and wanted in text


def sums_of_its_own(rank, size):
    """The training loop adds something up over the ranks, one of them before its step and one behind it."""
    its, model, called, optimizer = setup("inside")
    start, own = copies(model), torch.full((3,), 1.0 + rank)
    backward(called, share(rank, size))
    if rank == 0:
        work = dist.all_reduce(own, async_op=True)
    optimizer.step()
    if rank == 1:
        work = dist.all_reduce(own, async_op=True)
    work.wait()
    return own.tolist(), moved(model, start)


def test_what_the_engine_says_meets_nothing_of_the_training_loop(pool):
    for own, found in pool.run(2, sums_of_its_own):
        assert own == [3.0] * 3 and close(found, expected(mlp(), samples()))


class Both(nn.Module):
    def __init__(self, private, public):
        super().__init__()
        self.private, self.public = private, public

    def forward(self, x):
        return self.private(x) + self.public(torch.ones(1, 3))


def partly_public(rank, size, frozen):
    """What is public is within the same DistributedDataParallel."""
    its, model = engine(), Both(mlp(), nn.Linear(3, 1).requires_grad_(not frozen))
    called = DistributedDataParallel(Both(its.compile(model.private), model.public))
    optimizer, start = its.attach(torch.optim.SGD(model.private.parameters(), lr=1.0)), copies(model.private)
    backward(called, share(rank, size))
    optimizer.step()
    return moved(model.private, start)


def test_a_public_part_must_not_share_a_replica(pool):
    for found in pool.outcomes(2, partly_public, False):
        assert found[0] == "OptionError" and "has public.weight, too, which is trained" in found[1]
    one, other = pool.run(2, partly_public, True)
    assert same(one, other)


def public_beside(rank, size):
    """Each part has a DistributedDataParallel of its own, and the public one an optimizer of its own."""
    its, private, public = engine(), mlp(), nn.Linear(3, 1)
    called = Both(DistributedDataParallel(its.compile(private)), DistributedDataParallel(public))
    optimizer, start = its.attach(torch.optim.SGD(private.parameters(), lr=1.0)), copies(private)
    called.private(share(rank, size)).square().sum(1).mean().backward()
    (called.public(torch.ones(1, 3)) * (rank + 1)).sum().backward()
    optimizer.step()
    torch.optim.SGD(public.parameters(), lr=1.0).step()
    return moved(private, start), public.bias.grad.item()


def test_a_public_part_has_a_replica_of_its_own(pool):
    for found, mean in pool.run(2, public_beside):
        assert mean == 1.5 and close(found, expected(mlp(), samples()))


def given(rank, size, kind, cases):
    """What each rank says of a step over rows of its own, and whether it has been counted."""
    found = []
    for rows in cases:
        its, _, called, optimizer = setup("inside") if kind == "replica" else sharded.setup(clipping=kind)
        text = text_of(lambda: sharded.steps(called, optimizer, rows[rank], 1))  # noqa: B023  called at once
        found.append((text, its.steps_done))
    return found


GAPS = samples(4).index_fill(1, torch.tensor(1), math.nan)
APART = [
    ("each has its own", [samples(4), samples(8)[4:]], False),
    ("the same", [samples(4), samples(4)], True),
    ("one of them none", [samples(4), samples(0)], False),
    ("both of them none", [samples(0), samples(0)], False),
    ("in another order", [samples(4), samples(4).flip(0)], False),  # a step has more of them than it compares
    ("nothing to tell them by", [torch.ones(2, 3), torch.ones(2, 3)], False),
    ("the same, with gaps", [GAPS, GAPS], True),
    ("each its own, with gaps", [GAPS, GAPS.flip(0) + 1], False),
]


@pytest.mark.parametrize("kind", ["replica", "flat"])
def test_ranks_are_given_other_samples(kind, pool):
    for found in pool.run(2, given, kind, [rows for _, rows, _ in APART]):
        for (text, steps), (case, _, refused) in zip(found, APART, strict=True):
            assert steps == (0 if refused else 1), case
            assert ("ranks 0 and 1 were given the same samples" in text) if refused else text is None, case


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 3)

    def forward(self, tokens, positions):
        return self.table(tokens) + positions


class Positions(nn.Module):
    """A part of their own, which is called first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.tokens, self.head = nn.Embedding(4, 3), Tokens(), nn.Linear(3, 1)

    def forward(self, tokens, positions):
        return self.head(self.tokens(tokens, self.positions(positions)))

    def parts(self):
        return [self.positions, self.tokens, self.head]


def given_positions(rank, size, alike):
    its, _, called, optimizer = sharded.setup(Positions(), noise_multiplier=1.0)
    tokens = torch.randint(0, 11, (4, 4), generator=torch.Generator().manual_seed(0 if alike else rank))
    called(tokens, torch.arange(4).repeat(4, 1)).square().mean((1, 2)).mean().backward()
    return text_of(optimizer.step), its.steps_done


@pytest.mark.parametrize("alike", [False, True])
def test_positions_are_the_same_on_all_ranks(alike, pool):
    for text, done in pool.run(2, given_positions, alike):
        assert done == (0 if alike else 1)
        assert ("ranks 0 and 1 were given the same samples" in text) if alike else text is None
