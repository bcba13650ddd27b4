"""The parts of several ranks are one draw: nobody is drawn twice, nobody is left out, and all take as many batches."""

import itertools

import pytest
import torch
from torch.utils.data import TensorDataset

from flashdp_compile.data import PoissonSampler
from flashdp_compile.data.loader import PrivateLoader
from flashdp_compile.data.sampler import Part

SECRET = 0x1234567890ABCDEF
RUN = {"sample_size": 60, "sample_rate": 0.2, "steps": 40}


def samplers(ranks, secret=SECRET, **changes):
    return [PoissonSampler(**{**RUN, **changes}, part=Part(rank, ranks, secret)) for rank in range(ranks)]


def logical(sampler):
    """[[indices of each micro-batch] of each logical batch]."""
    found = [[]]
    for batch in sampler:
        found[-1].append(batch)
        if sampler.received().last:
            found.append([])
    assert found.pop() == []
    return found


def joined(parts):
    return [sorted(itertools.chain(*itertools.chain(*step))) for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("how", [{}, {"physical_batch_size": 3}, {"cap": 7}, {"physical_batch_size": 5, "least": 2}])
def test_a_seed_draws_what_one_rank_would(ranks, rate, how):
    alone = logical(PoissonSampler(**{**RUN, "sample_rate": rate, **how}, seed=3))
    parts = [logical(one) for one in samplers(ranks, sample_rate=rate, seed=3, **how)]
    assert joined(parts) == [sorted(itertools.chain(*step)) for step in alone]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("physical", "least"), [(None, 1), (2, 1), (3, 2), (4, 2), (None, 2)])
def test_all_ranks_take_as_many_micro_batches(ranks, physical, least):
    parts = [logical(one) for one in samplers(ranks, physical_batch_size=physical, least=least)]
    sizes = set()
    for step in zip(*parts, strict=True):
        assert len({len(part) for part in step}) == 1
        batches = [batch for part in step for batch in part]
        whole = list(itertools.chain(*batches))
        assert len(set(whole)) == len(whole)
        for batch in batches:
            assert len(batch) <= (physical or len(whole))
            assert len(batch) >= least or len(batch) in (0, len(whole))
        largest = max(len(list(itertools.chain(*part))) for part in step)
        assert len(step[0]) == max(-(-largest // (physical or RUN["sample_size"])), 1), "no more than are needed"
        if least == 1:
            mine = [len(list(itertools.chain(*part))) for part in step]
            assert max(mine) - min(mine) <= 1 and mine == sorted(mine, reverse=True)
        sizes.add(len(whole))
    assert len(sizes) > 5


@pytest.mark.parametrize("count", range(10))
def test_no_part_of_one_sample(count):
    """Norms of one sample are exact, those of several are estimated: who is with whom must not decide."""
    parts = [
        logical(one) for one in samplers(4, sample_size=max(count, 1), sample_rate=min(count, 1.0) or 1e-9, least=2)
    ]
    for step in zip(*parts, strict=True):
        mine = [len(list(itertools.chain(*part))) for part in step]
        assert sum(mine) == count and (1 not in mine or count == 1)


def test_everyone_takes_part_as_often_as_the_rate_says():
    counts = torch.zeros(RUN["sample_size"])
    for part in map(logical, samplers(3, steps=2000)):
        for index in itertools.chain(*itertools.chain(*part)):
            counts[index] += 1
    deviation = (2000 * 0.2 * 0.8) ** 0.5
    assert (counts - 400).abs().max() < 4.5 * deviation


def test_without_a_seed_every_iteration_draws_anew():
    parts = samplers(2)
    draws = [list(zip(*map(list, each), strict=True)) for each in (parts, parts, samplers(2, secret=SECRET + 1))]
    steps = [sorted(itertools.chain(*step)) for draw in draws for step in draw]
    assert len(steps) == 3 * RUN["steps"] == len(set(map(tuple, steps))), "no step is drawn twice"
    assert all(len(set(step)) == len(step) for step in steps), "nobody twice in a step"


def test_what_is_begun_is_counted_and_not_what_is_made():
    """A DataLoader with workers makes an iterator of the sampler that it does not use: ranks may differ in workers."""
    one, other = samplers(2)
    iter(other)
    assert one.iterations == other.iterations == 0
    parts = [logical(one), logical(other)]
    assert one.iterations == other.iterations == 1
    for step in zip(*parts, strict=True):
        whole = list(itertools.chain(*itertools.chain(*step)))
        assert len(set(whole)) == len(whole)


def test_workers_on_one_rank_only():
    rows, seen = TensorDataset(torch.arange(60)), []
    for sampler, workers in zip(samplers(2, sample_rate=1.0, steps=2, cap=30), (0, 1), strict=True):
        loader = PrivateLoader(rows, sampler, num_workers=workers)
        seen.append([batch[0].tolist() for batch in loader])
    for step in zip(*seen, strict=True):
        assert len(set(itertools.chain(*step))) == 30


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("physical", [None, 3, 20, 30])
def test_the_length_is_told_where_it_is_known(ranks, physical):
    for one in samplers(ranks, physical_batch_size=physical, sample_rate=1.0):
        if physical is None or physical >= 60 / ranks:
            assert len(one) == len(list(one))
        else:
            with pytest.raises(TypeError, match="micro-batches is random"):
                len(one)
