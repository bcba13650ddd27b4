"""Every rank adds the same noise, of one step of one run: as much as a single process would, and no less."""

import functools
import itertools
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import flashdp_compile.engine.ranks as module
from engine.runs import BATCH, BOUND, copies, engine, samples
from ranks.runs import close, same, setup, share, take_steps

SIGMA = 0.8


def seeded(rank, size, noises, how):
    """Parameters after three steps, with rows on all ranks or on the last one only."""
    rows = share(rank, size) if how == "shared" else samples() if rank == size - 1 else samples()[:0]
    found = []
    for noise in noises:
        its, model, called, optimizer = setup("inside", noise_multiplier=SIGMA, seed=7, noise=noise)
        take_steps(its, called, optimizer, [rows] * 3)
        found.append(copies(model))
    return found


@pytest.fixture(scope="module")
def alone(pool):
    """What one rank has, by the function."""
    return functools.cache(lambda function, *args: pool.run(1, function, *args)[0])


NOISES = ("secure", "philox")


@pytest.mark.parametrize(("size", "how"), [(2, "shared"), (2, "last"), (4, "shared")])
def test_a_seed_gives_the_run_of_one_rank(pool, alone, size, how):
    """Bit for bit, where all rows are on one rank: sums of parts are rounded otherwise."""
    one, ranks = alone(seeded, NOISES, "shared"), pool.run(size, seeded, NOISES, how)
    for number, found in itertools.product(range(2), ranks):
        assert same(found[number], ranks[0][number])
        assert same(found[number], one[number]) if how == "last" else close(found[number], one[number], 1e-6)


def in_waves(rank, size):
    """What `seeded` has where each sum comes by itself."""
    with mock.patch.object(module, "WAVE", 1):
        return seeded(rank, size, NOISES, "last")


def test_noise_that_is_added_while_other_sums_are_on_their_way(pool, alone):
    one = alone(seeded, NOISES, "shared")
    for found in pool.run(2, in_waves):
        assert all(map(same, found, one))


def test_sums_come_in_waves_of_a_size(monkeypatch):
    monkeypatch.setattr(module, "WAVE", 8)
    sizes = [(1, torch.float32), (1, torch.float32), (3, torch.float32), (1, torch.float64), (1, torch.float32)]
    assert module._waves([torch.zeros(n, dtype=dtype) for n, dtype in sizes]) == [[0, 1], [2], [3], [4]]
    assert module._waves([]) == []


def loaded(rank, size, pads, steps=3):
    """Parameters and rows seen, with samples that the engine draws."""
    found = []
    for pad in pads:
        settings = {"sampling": None, "sample_size": 40, "steps": steps, "noise_multiplier": SIGMA, "seed": 7}
        its, model, called, optimizer = setup("inside", **settings)
        rows = torch.cat([samples(40), torch.arange(40.0)[:, None]], 1)
        loader, seen, batches = its.data_loader(TensorDataset(rows), physical_batch_size=3, pad=pad), [], 0
        for batch in loader:
            (x,), weight = batch if pad else (batch, torch.ones(len(batch[0])))
            optimizer.zero_grad()
            (called(x[:, :3]).square().sum(1) * weight).sum().div(max(len(x), 1)).backward()
            optimizer.step()
            seen += x[weight > 0, 3].tolist()
            batches += 1
            assert its.stepped == loader.last
        assert its.steps_done == steps
        found.append((copies(model), seen, batches))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_loader_gives_the_run_of_one_rank(pool, alone, size):
    one, ranks = alone(loaded, (False, True)), pool.run(size, loaded, (False, True))
    for number in range(2):
        values, seen, batches = one[number]
        for found, *_ in (rank[number] for rank in ranks):
            assert same(found, ranks[0][number][0])
            assert close(found, values, 1e-6)
        assert sorted(seen) == sorted(itertools.chain(*(rank[number][1] for rank in ranks)))
        assert len({rank[number][2] for rank in ranks}) == 1 and ranks[0][number][2] < batches


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2000, 100)

    def forward(self, x):
        return self.layer(x)


def silence(rank, size, noises, runs, steps):
    """[steps, elements] of each of several runs for each kind of noise: what is released where all gradients are 0."""
    found = {}
    for noise in noises:
        for _ in range(runs):
            model = Wide()
            its = engine(noise_multiplier=SIGMA, noise=noise)
            called = its.compile(model)
            optimizer = its.attach(torch.optim.SGD(model.parameters(), lr=0.1))
            drawn = []
            for _ in range(steps):
                optimizer.zero_grad()
                (called(torch.zeros(2, 2000)).sum(1) * 0.0).mean().backward()
                optimizer.step()
                drawn.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            found.setdefault(noise, []).append(torch.stack(drawn))
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_noise_without_a_seed(pool, size):
    ranks = pool.run(size, silence, ("secure", "philox"), 2, 2)
    for noise, runs in ranks[0].items():
        assert all(torch.equal(a, b) for rank in ranks for a, b in zip(rank[noise], runs, strict=True)), "on all ranks"
        draws = torch.cat(runs)  # two runs of two steps
        assert draws.shape == (4, 200_100)
        expected = (SIGMA * BOUND / BATCH) ** 2
        assert draws.square().mean().item() == pytest.approx(expected, rel=0.01)
        for draw in draws:
            assert draw.var().item() == pytest.approx(expected, rel=0.02)
        assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.015, "no two draws have anything in common"


def keys(rank, size, runs):
    """The keys of several engines, and of one that goes on."""
    found = []
    for noise, _ in itertools.product(("secure", "philox"), range(runs)):
        its = engine(noise_multiplier=SIGMA, noise=noise)
        before = its._steps.noise.key(torch.device("cpu"), 1).tolist()
        its.load_state_dict(its.state_dict())
        found += [before, its._steps.noise.key(torch.device("cpu"), 1).tolist()]
    return found


def test_keys_are_shared_by_ranks_and_by_nothing_else(pool):
    ranks = pool.run(4, keys, 2)
    assert all(rank == ranks[0] for rank in ranks)
    again = pool.run(2, keys, 1)
    assert len({tuple(key) for key in ranks[0] + again[0]}) == len(ranks[0] + again[0])
