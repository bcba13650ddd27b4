"""What an engine does beside sums and noise: norms that are estimated, bounds that move, budgets that go on."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from engine.runs import copies, engine, moved
from flashdp_compile import Quantile, accounting
from flashdp_compile.engine.journal import RESERVED
from ranks.runs import as_replica, backward, close, same, setup, share, take_steps

ESTIMATED = {"options": {"norm": "hutchinson", "probes": 16, "compiler": "eager"}, "max_grad_norm": 0.1}
WIDTH = 96  # layers of this size are estimated


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(90, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def estimated(rank, size, seed):
    """What two steps have moved, and the key that the probes of the first had."""
    its, model, called, optimizer = setup(
        "inside", wide, seed=seed, sampling=accounting.Poisson(0.01, 800), **ESTIMATED
    )
    rows = torch.randn(8, 90, generator=torch.Generator().manual_seed(1))
    key, start = its._steps._from_engine.probes.key(torch.device("cpu")).tolist(), copies(model)
    take_steps(its, called, optimizer, [share(rank, size, rows)] * 2)
    assert its._steps._from_engine.probes.moves == 2
    return moved(model, start), key, its._steps._from_engine.probes.key(torch.device("cpu")).tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_have_the_same_probes(pool, size):
    ((alone, key, _),), ranks = pool.run(1, estimated, 3), pool.run(size, estimated, 3)
    for found, its, _ in ranks:
        assert close(found, alone, 1e-4) and same(found, ranks[0][0]) and its == key


def test_probes_without_a_seed(pool):
    (one, first, later), (other, too, later_too) = pool.run(2, estimated, None)
    assert same(one, other) and first == too and later == later_too
    assert first[0] == later[0] and first[1] + 2 == later[1]
    again = pool.run(2, estimated, None)
    assert again[0][1][0] != first[0]


def bounds(rank, size, clipping):
    how = {"bounds": Quantile(target=0.3, rate=0.7), "clipping": clipping, "noise_multiplier": 1.0, "seed": 5}
    its, model, called, optimizer = setup("inside", **how)
    found = []
    for _ in range(3):
        take_steps(its, called, optimizer, [share(rank, size)])
        found.append(its.max_grad_norm())
    return found, copies(model)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_votes_are_those_of_all_ranks(pool, clipping):
    ((alone, values),), ranks = pool.run(1, bounds, clipping), pool.run(2, bounds, clipping)
    for found, after in ranks:
        assert found == ranks[0][0] and close(after, values)
        for step, expected in zip(found, alone, strict=True):
            assert step == pytest.approx(expected, rel=1e-6)


def journaled(rank, size, path, steps, saved, way):
    """A run that goes on with what another has saved."""
    its, model, called, optimizer = setup(way, noise_multiplier=1.0, seed=5, journal=path if rank == 0 else f"{path}x")
    begun = its.steps_done
    if saved is not None:
        with torch.no_grad():
            for p, value in zip(model.parameters(), saved[1], strict=True):
                p.copy_(value)
        its.load_state_dict(saved[0])
    take_steps(its, called, optimizer, [share(rank, size)] * steps)
    return begun, its.steps_done, (json.loads(json.dumps(its.state_dict())), copies(model))


@pytest.mark.parametrize("sizes", [(2, 1), (2, 4), (1, 2)], ids=str)
def test_a_run_goes_on_with_other_ranks(pool, tmp_path, sizes):
    whole = pool.run(1, journaled, str(tmp_path / "whole.json"), 4, None, "none")[0][2][1]
    path, (before, after) = tmp_path / "run.json", sizes
    first = pool.run(before, journaled, str(path), 2, None, "inside")
    assert [(begun, done) for begun, done, _ in first] == [(0, 2)] * before
    assert json.loads(path.read_text())["spent"] == 2, "settled when its state was saved"
    saved = first[0][2]
    second = pool.run(after, journaled, str(path), 2, saved, "inside")
    assert [(begun, done) for begun, done, _ in second] == [(2, 4)] * after, "all begin where the journal is"
    assert all(close(found[1], whole) for *_, found in second)
    assert not (tmp_path / "run.jsonx").exists(), "only the first rank writes"


def killed(rank, size, path):
    """Steps without a saved state: what was reserved counts."""
    its, model, called, optimizer = setup("inside", noise_multiplier=1.0, journal=path)
    begun = its.steps_done
    take_steps(its, called, optimizer, [share(rank, size)])
    return begun, its.steps_done


def test_what_was_reserved_is_spent_on_all_ranks(pool, tmp_path):
    path = str(tmp_path / "run.json")
    assert pool.run(2, killed, path) == [(0, 1)] * 2
    assert pool.run(4, killed, path) == [(RESERVED, RESERVED + 1)] * 4


def in_use(rank, size, path):
    held = engine(journal=path)
    try:
        engine(journal=path)
    except Exception as error:
        return held.steps_done, type(error).__name__, str(error)


def test_a_journal_in_use(pool, tmp_path):
    (_, kind, text), (_, other, too) = pool.run(2, in_use, str(tmp_path / "run.json"))
    assert kind == "OptionError" and "is in use by another run" in text
    assert other == "RanksError" and "rank 0 has failed: OptionError: journal=" in too and "in use" in too


def small_batches(rank, size):
    """A loader under estimated norms, with fewer samples than two for each rank."""
    its = engine(
        sampling=None, sample_size=4, expected_batch_size=3, steps=6, noise_multiplier=0.5, seed=1, **ESTIMATED
    )
    model = wide()
    called = as_replica(its, model, "inside")
    optimizer, sizes = its.attach(torch.optim.SGD(model.parameters(), lr=0.1)), []
    rows = torch.randn(4, 90, generator=torch.Generator().manual_seed(1))
    for (x,) in its.data_loader(TensorDataset(rows), physical_batch_size=3):
        optimizer.zero_grad()
        backward(called, x)
        optimizer.step()
        sizes.append(len(x))
    return its.steps_done, sizes, copies(model)


def test_ranks_without_samples(pool):
    ranks = pool.run(4, small_batches)
    assert all(done == 6 and same(values, ranks[0][2]) for done, _, values in ranks)
    assert any(0 in sizes for _, sizes, _ in ranks)
    for step in zip(*(sizes for _, sizes, _ in ranks), strict=True):
        assert 1 not in step or sum(step) == 1


def drawn(rank, size):
    """The rows of each step, where nobody has given a seed."""
    its = engine(sampling=None, sample_size=50, expected_batch_size=20, steps=10)
    rows = TensorDataset(torch.arange(50))
    return [x.tolist() for (x,) in its.data_loader(rows, num_workers=0)]


def test_ranks_share_a_draw_that_nobody_can_repeat(pool):
    runs = [pool.run(2, drawn) for _ in range(2)]
    steps = [sorted(one + other) for one, other in (step for run in runs for step in zip(*run, strict=True))]
    assert all(len(set(step)) == len(step) for step in steps), "nobody is in two parts"
    assert len(set(map(tuple, steps))) == 20
