"""A sharded model is trained as a whole one is: the same sums, the same noise, whatever the number of ranks."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as state
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

from engine.runs import BATCH, BOUND, clipped_sum, copies, engine, samples
from flashdp_compile.engine.sharded import _kept
from ranks.runs import Heads, Images, backward, close, same, share
from ranks.sharded import Net, clipped_by_part, full, setup, shard, steps

SIGMA = 0.8
LAYER, BLOCK, FLAT = "per_layer", "per_block", "flat"


def flatly(net):
    return clipped_sum(net, samples())


def sums(rank, size, cases):
    """What a step without noise has moved, for each (way, clipping)."""
    found = []
    for way, clipping in cases:
        its, net, called, optimizer = setup(way=way, clipping=clipping)
        start = full(net)
        steps(called, optimizer, share(rank, size), 1)
        assert its.stepped
        found.append([a - b for a, b in zip(start, full(net), strict=True)])
    return found


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (1, [("whole", LAYER), ("parts", FLAT)]),
        (2, [("parts", BLOCK), ("together", LAYER), ("blocks", FLAT)]),
        (4, [("blocks", BLOCK), ("parts", FLAT)]),
    ],
    ids=["1", "2", "4"],
)
def test_sums_are_those_of_one_process(pool, size, cases):
    wanted = dict(zip((LAYER, FLAT), sums(0, 1, [(None, LAYER), (None, FLAT)]), strict=True))
    wanted[BLOCK] = clipped_by_part(Net())
    for rank in pool.run(size, sums, cases):
        for (way, clipping), found in zip(cases, rank, strict=True):
            assert close(found, wanted[clipping]), (way, clipping)
    for one, other in itertools.combinations(wanted.values(), 2):
        assert not close(one, other, 1e-2), "bounds are others"


def laid_out(rank, size, roots, sizes):
    """For each root what a step has moved."""
    found = []
    for root in roots:
        its, net = engine(clipping="per_block"), root()
        start = copies(net)
        called = its.compile(fully_shard(net, mesh=init_device_mesh("cpu", (size,))))
        optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=1.0))
        backward(called, samples().split(sizes)[rank])
        optimizer.step()
        found.append([a - b for a, b in zip(start, full(net), strict=True)])
    return found


@pytest.mark.parametrize("sizes", [[1, 7], [8, 0]], ids=str)
def test_sums_that_ranks_have_laid_out_in_other_orders(pool, sizes):
    roots = Heads, Images
    for rank in pool.run(2, laid_out, roots, sizes):
        for root, found in zip(roots, rank, strict=True):
            assert close(found, clipped_sum(root(), samples()))


def kept(rank, size):
    net = Net()
    net.first.requires_grad_(False)
    net = shard(net)
    own = [(p.to_local().numel(), p.requires_grad) for p in net.parameters()]
    dist.barrier()  # who leaves before the other has come takes the connection along
    return _kept(net), sum((8 if trained else 4) * count for count, trained in own)


def test_what_a_rank_keeps_of_parameters_and_their_sums(pool):
    found = pool.run(2, kept)
    assert all(told == wanted > 0 for told, wanted in found) and found[0] != found[1]


def test_parameters_in_bfloat16(pool):
    """Their sums are in float32: a sum of this few samples in bfloat16 is another on two ranks."""
    (alone,) = pool.run(1, sums, [("bfloat16", BLOCK)])
    for rank in pool.run(2, sums, [("bfloat16", BLOCK)]):
        assert close(rank[0], alone[0], 1e-6) and close(rank[0], clipped_by_part(Net()), 3e-2)


def accumulated(rank, size, clipping):
    """Two steps of two micro-batches: what p.grad holds from the first is never cleared, and no part of the second."""
    its, net, called, optimizer = setup(micro_batches=2, clipping=clipping)
    found = []
    for _ in range(2):
        start = full(net)
        for number, rows in enumerate(share(rank, size).chunk(2)):
            backward(called, rows)
            optimizer.step()
            assert its.stepped == (number == 1)
            with torch.no_grad():
                called(samples(3))
        found.append((start, [a - b for a, b in zip(start, full(net), strict=True)]))
    return found


@pytest.mark.parametrize(("clipping", "truth"), [(BLOCK, clipped_by_part), (FLAT, flatly)], ids=[BLOCK, FLAT])
def test_micro_batches(clipping, truth, pool):
    ranks = pool.run(2, accumulated, clipping)
    for start, found in (step for rank in ranks for step in rank):
        net = Net()
        with torch.no_grad():
            for p, value in zip(net.parameters(), start, strict=True):
                p.copy_(value)
        assert close(found, truth(net))


def forgotten(rank, size):
    """Whether a model that was trained is gone once nobody has it, while its last release is known."""
    its, net, called, optimizer = setup()
    steps(called, optimizer, share(rank, size), 1)
    known = weakref.ref(net)
    del its, net, called, optimizer
    gc.collect()
    return known() is None


def test_a_model_does_not_outlive_its_run(pool):
    assert pool.run(1, forgotten) == [True]


def seeded(rank, size, cases, clipping=LAYER):
    """Parameters after three steps for each (way, noise), the rows all on the last rank: sums are rounded alike."""
    found = []
    for way, noise in cases:
        its, net, called, optimizer = setup(way=way, clipping=clipping, noise_multiplier=SIGMA, seed=7, noise=noise)
        steps(called, optimizer, samples() if rank == size - 1 else samples()[:0], 3)
        assert its.steps_done == 3
        found.append(full(net))
    return found


NOISES = ("secure", "philox")


@pytest.mark.parametrize(("way", "clipping"), [("bfloat16", BLOCK), ("parts", FLAT)])
def test_a_seed_gives_the_run_of_one_rank(way, clipping, pool):
    cases = [(way, noise) for noise in NOISES]
    (alone,) = pool.run(1, seeded, cases, clipping)
    for rank in pool.run(2, seeded, cases, clipping):
        assert all(same(found, wanted) for found, wanted in zip(rank, alone, strict=True))
    if clipping == FLAT:  # and of a whole model, but for roundings of the shares
        whole = seeded(0, 1, [(None, noise) for noise in NOISES], clipping)
        assert all(close(found, wanted) for found, wanted in zip(alone, whole, strict=True))


@pytest.mark.parametrize(("size", "ways"), [(3, ["blocks"]), (2, ["reversed"]), (4, ["hybrid"])])
def test_a_seed_gives_the_run_of_one_process(pool, size, ways):
    """Bit for bit: shards of any size, that begin within a block of noise, or are empty."""
    alone = dict(zip(NOISES, seeded(0, 1, [(None, noise) for noise in NOISES]), strict=True))
    cases = list(itertools.product(ways, NOISES))
    for rank in pool.run(size, seeded, cases):
        for (way, noise), found in zip(cases, rank, strict=True):
            assert same(found, alone[noise]), (way, noise)


def copies_in_another_order(rank, size):
    setup(shard(Net(), mesh=DeviceMesh("cpu", [[1, 0], [2, 3]], mesh_dim_names=("copies", "shards"))), None)


def test_copies_whose_shards_are_in_another_order(pool):
    """Each rank of the first copy has what another one of the second has than the mesh says."""
    one, two, three, four = pool.outcomes(4, copies_in_another_order)
    assert one.kind == two.kind == "OptionError" and "has ranks in another order" in one.text
    assert three.kind == four.kind == "RanksError" and "rank 0 has failed" in three.text


def loaded(rank, size):
    its, net, called, optimizer = setup(
        way=None if size == 1 else "parts",
        clipping=LAYER,
        noise_multiplier=SIGMA,
        seed=7,
        sampling=None,
        sample_size=40,
        steps=2,
    )
    for (x,), weight in its.data_loader(TensorDataset(samples(40)), physical_batch_size=3, pad=True):
        optimizer.zero_grad()
        (called(x).square().sum(1) * weight).mean().backward()
        optimizer.step()
    assert its.steps_done == 2
    return full(net)


def test_a_loader_gives_the_run_of_one_process(pool):
    alone = loaded(0, 1)
    for found in pool.run(2, loaded):
        assert close(found, alone, 1e-6)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(500, 201), nn.Linear(201, 500)

    def forward(self, x):
        return self.second(self.first(x))

    def parts(self):
        return [self.first, self.second]


def silence(rank, size, noises):
    """[steps, elements] of this rank for each kind of noise: what is released where all gradients are 0."""
    found = []
    for noise in noises:
        its, net, called, optimizer = setup(Wide(), noise_multiplier=SIGMA, noise=noise)
        drawn = []
        for _ in range(2):
            optimizer.zero_grad()
            (called(torch.zeros(2, 500)).sum(1) * 0.0).mean().backward()
            optimizer.step()
            drawn.append(torch.cat([p.grad._local_tensor.flatten() for p in net.parameters()]))
        assert its.steps_done == 2
        found.append(torch.stack(drawn))
    return found


def test_noise_without_a_seed(pool):
    one, other = pool.run(2, silence, NOISES)
    for a, b in zip(one, other, strict=True):
        count = min(a.shape[1], b.shape[1])
        assert a.shape[1] + b.shape[1] == 2 * 201 * 500 + 701
        expected = (SIGMA * BOUND / BATCH) ** 2
        both = torch.cat([a.flatten(), b.flatten()])
        assert len(both) > 400_000 and both.square().mean().item() == pytest.approx(expected, rel=0.01)
        draws = torch.cat([a[:, :count], b[:, :count], a[:1, -count:]])[:4]
        assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.015, "no shard and no step has that of another"
        layers = [row[k * count // 2 :][: count // 2] for row in a for k in (0, 1)]
        assert (torch.corrcoef(torch.stack(layers)) - torch.eye(4)).abs().max() < 0.02


def of_run(way="parts"):
    its, net = engine(clipping="per_block", noise_multiplier=SIGMA, seed=7), shard(Net(), way)
    return its, net, torch.optim.AdamW(net.parameters(), lr=0.1)


def uninterrupted(rank, size, folder):
    """Four steps; what is saved behind two of them."""
    its, net, optimizer = of_run()
    its.compile(net)
    its.attach(optimizer)
    rows = samples() if rank == size - 1 else samples()[:0]
    steps(net, optimizer, rows, 2)
    weights, moments = state.get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    told = its.state_dict()
    steps(net, optimizer, rows, 2)
    return told, full(net)


def resumed(rank, size, folder, told):
    its, net, optimizer = of_run()
    weights, moments = state.get_state_dict(net, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    state.set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=moments)
    its.compile(net)
    its.attach(optimizer)
    its.load_state_dict(told)
    steps(net, optimizer, samples() if rank == size - 1 else samples()[:0], 2)
    assert its.steps_done == 4
    return full(net)


def test_a_run_goes_on_with_other_ranks(pool, tmp_path):
    (told, expected), _ = pool.run(2, uninterrupted, tmp_path)
    for size in (1, 4):
        for found in pool.run(size, resumed, tmp_path, told):
            assert same(found, expected), size
