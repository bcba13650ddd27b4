"""What is wrong on one rank is said on all of them, in good time, and none of them takes the step."""

import contextlib
import time
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.data import TensorDataset

from engine.runs import copies, engine, mlp, samples
from flashdp_compile import Quantile
from ranks.runs import backward, same, setup, share, take_steps, text_of


def attempts(model, *actions):
    """(kind and text of the error, or None, for each of the actions), and whether the model is what it was."""
    start, found = copies(model), []
    for action in actions:
        try:
            action()
            found.append(None)
        except Exception as error:
            found.append((type(error).__name__, " ".join(str(error).split())))
    return found, same(start, copies(model))


def arguments(rank, size, name, values):
    engine(**{name: values[rank % 2]})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_grad_norm", (1.0, 2.0)),
        ("clipping", ("flat", "per_layer")),
        ("noise_multiplier", (1.0, 1.5)),
        ("steps", (10, 11)),
        ("expected_batch_size", (8, 16)),
        ("noise", ("secure", "philox")),
        ("seed", (1, None)),
        ("seed", (1, 2)),
        ("options", ({"compiler": "eager"}, {"compiler": "eager", "clip_fn": "automatic"})),
        ("bounds", (None, Quantile())),
        ("bounds", (Quantile(), Quantile(target=0.6))),
        ("micro_batches", (1, 2)),
        ("target_delta", (1e-5, 1e-6)),
        ("accountant", ("pld", "rdp")),
    ],
    ids=str,
)
def test_other_arguments(pool, name, values):
    size = 4 if name == "max_grad_norm" else 2
    for found in pool.outcomes(size, arguments, name, values):
        assert found[0] == "RanksError" and "ranks do not agree" in found.text, found
        assert ("ranks 0, 2: " if size == 4 else "rank 0: ") + "the engine's arguments: " in found.text
        assert f" {'clip_fn' if name == 'options' else name}=" in found.text
        assert len(found.text) < 300, "what is equal is not told"


def test_an_argument_that_is_not_allowed_on_one_rank(pool):
    one, other = pool.outcomes(2, arguments, "steps", (-1, 10))
    assert one.kind == "OptionError" and other.kind == "RanksError"
    assert "rank 0 has failed: OptionError: steps=-1" in other.text


def with_journal(rank, size, paths):
    engine(journal=paths[rank])


def test_a_journal_that_only_one_rank_knows(pool, tmp_path):
    for found in pool.outcomes(2, with_journal, (None, tmp_path / "run.json")):
        assert found is not None and found.kind == "RanksError" and "journal" in found.text


def plain_backward(rank, its, model, called, optimizer):
    backward(called, share(rank, 2))
    if rank == 1:
        backward(model, samples(1))


def outside(rank, its, model, called, optimizer):
    """A parameter of the optimizer that is also used outside of the compiled region."""
    loss = called(share(rank, 2)).square().sum(1).mean()
    (loss + 1e-3 * model[0].weight.square().sum() if rank == 1 else loss).backward()


def fewer_parameters(rank, its, model, called, optimizer):
    backward(called, share(rank, 2))
    if rank == 1:
        del optimizer.param_groups[0]["params"][-1]


def two_passes(rank, its, model, called, optimizer):
    for _ in range(rank + 1):
        backward(called, share(rank, 2))


def no_pass(rank, its, model, called, optimizer):
    if rank == 0:
        backward(called, share(rank, 2))


CASES = {
    plain_backward: ("UnprotectedGradientError", "not made by a backward that flashdp compiled"),
    outside: ("UnprotectedGradientError", "not made by a backward that flashdp compiled"),
    fewer_parameters: ("RanksError", "ranks do not agree"),
    two_passes: ("UnprotectedGradientError", "holds 2 backward passes"),
    no_pass: ("UnprotectedGradientError", "holds 0 backward passes"),
}


def refused(rank, size, prepare, way):
    its, model, called, optimizer = setup(way, noise_multiplier=1.0)
    prepare(rank, its, model, called, optimizer)
    return attempts(model, optimizer.step)


@pytest.mark.parametrize("way", ["inside", "none"])
@pytest.mark.parametrize("prepare", CASES, ids=lambda case: case.__name__)
def test_a_step_that_one_rank_must_not_take(pool, prepare, way):
    (((one,), kept), ((other,), too)) = pool.run(2, refused, prepare, way)
    kind, text = CASES[prepare]
    assert kept and too
    assert one is not None and other is not None
    assert one[0] == "RanksError" and other[0] == kind and text in other[1]
    assert "Nothing was released" in one[1]
    if kind != "RanksError":
        assert f"rank 1 has failed: {kind}" in one[1] and text in one[1]


def goes_on(rank, size):
    """A step that one rank must not take, and the two behind it."""
    its, model, called, optimizer = setup("inside", noise_multiplier=1.0)
    plain_backward(rank, its, model, called, optimizer)
    (error,), kept = attempts(model, optimizer.step)
    assert error is not None and kept
    take_steps(its, called, optimizer, [share(rank, size)] * 2)
    return its.steps_done, copies(model)


def test_the_run_goes_on_behind_a_step_that_was_refused(pool):
    (done, one), (too, other) = pool.run(2, goes_on)
    assert done == too and same(one, other)


def noise(its, optimizer):
    return mock.patch.object(its._steps.noise, "add", side_effect=MemoryError("no room"))


def optimizer_itself(its, optimizer):
    return mock.patch("torch.optim.sgd.sgd", side_effect=MemoryError("no room"))


def parted(rank, size, failing):
    """A step that fails on one rank when all have agreed on it, and the two behind it."""
    its, model, called, optimizer = setup("inside", noise_multiplier=1.0)
    errors = []
    for number in range(3):
        backward(called, share(rank, size))
        with failing(its, optimizer) if (rank, number) == (0, 0) else contextlib.nullcontext():
            (error,), _ = attempts(model, optimizer.step)
        errors.append(error)
    return errors, its.steps_done


@pytest.mark.parametrize("failing", [noise, optimizer_itself], ids=lambda f: f.__name__)
def test_a_step_that_fails_on_one_rank_when_it_is_counted(pool, failing):
    """The other rank has taken it: from there on their parameters differ."""
    ((first, *one), done), ((none, *other), too) = pool.run(2, parted, failing)
    assert first == ("MemoryError", "no room") and none is None and done == too == 1
    for kind, text in one + other:
        assert kind == "RanksError" and "no room" in text and "Begin anew from a checkpoint" in text


def other_precision(rank, size):
    its, model, called, optimizer = setup("none", lambda: mlp().double() if rank else mlp())
    x = share(rank, size)
    backward(called, x.double() if rank else x)
    return attempts(model, optimizer.step)


def test_parameters_of_another_precision(pool):
    for (error,), kept in pool.run(2, other_precision):
        assert kept and error is not None and error[0] == "RanksError" and "ranks do not agree" in error[1]


def other_weights(rank, size):
    its, model, called, optimizer = setup("none", noise_multiplier=1.0)
    with torch.no_grad():
        model[0].bias += 1e-3 * rank
    backward(called, share(rank, size))
    return attempts(model, optimizer.step)


def test_replicas_that_are_none(pool):
    for (error,), kept in pool.run(2, other_weights):
        assert kept and error is not None and error[0] == "RanksError"
        assert "ranks 0 and 1 do not agree: other values of 0.bias" in error[1] and "makes them equal" in error[1]


def loaded_on_one(rank, size):
    """The run goes back to a state, and one rank to its weights."""
    its, model, called, optimizer = setup("none", noise_multiplier=1.0)
    state, weights = its.state_dict(), copies(model)
    take_steps(its, called, optimizer, [share(rank, size)])
    its.load_state_dict(state)
    if rank == 0:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
    backward(called, share(rank, size))
    return attempts(model, optimizer.step)


def test_weights_that_one_rank_has_loaded(pool):
    for (error,), kept in pool.run(2, loaded_on_one):
        assert kept and error is not None and error[0] == "RanksError" and "other values of 0.weight" in error[1]


def absent(rank, size, how):
    its, model, called, optimizer = setup("inside", noise_multiplier=1.0)
    take_steps(its, called, optimizer, [share(rank, size)])
    if rank == 1:
        if how == "raises":
            raise ValueError("no more")
        if how == "sleeps":
            time.sleep(7)
        return None
    backward(called, share(rank, size))
    begun = time.monotonic()
    return attempts(model, optimizer.step), time.monotonic() - begun


@pytest.mark.parametrize("how", ["ends", "raises", "sleeps"])
def test_a_rank_that_does_not_come(pool, how):
    wait = 4.0
    waiting, gone = pool.outcomes(2, absent, how, wait=wait)
    assert gone is None or gone == ("ValueError", "no more")
    ((error,), kept), seconds = waiting
    assert kept and error is not None and error[0] == "RanksError"
    assert "rank 0 has waited in vain" in error[1] and "Nothing was released" in error[1]
    assert seconds < wait + 2


def behind(rank, size):
    """One rank has taken a step of its loader without the others."""
    its, model, called, optimizer = setup(
        "inside", noise_multiplier=1.0, sampling=None, sample_size=20, steps=9, expected_batch_size=10
    )
    batches = iter(its.data_loader(TensorDataset(samples(20))))
    if rank == 1:
        next(batches)
    backward(called, next(batches)[0])
    return attempts(model, optimizer.step)


def test_a_rank_that_skips_a_batch(pool):
    ((one,), kept), ((other,), too) = pool.run(2, behind)
    assert kept and too and one is not None and other is not None
    assert "RanksError" in {one[0], other[0]}
    assert any(text in one[1] for text in ("ranks do not agree", "has failed")), one


def restarted(rank, size):
    """One rank begins its loader anew: it draws other samples from there on, some of which another rank has, too."""
    its, model, called, optimizer = setup(
        "inside", noise_multiplier=1.0, sampling=None, sample_size=20, steps=9, expected_batch_size=10
    )
    loader = its.data_loader(TensorDataset(samples(20)))
    batches = iter(loader)
    take_steps(its, called, optimizer, [next(batches)[0]])
    if rank == 1:
        batches = iter(loader)
    backward(called, next(batches)[0])
    return attempts(model, optimizer.step)


def test_a_rank_that_iterates_anew(pool):
    for (error,), kept in pool.run(2, restarted):
        assert error is not None and error[0] == "RanksError" and kept


def elsewhere(rank, size):
    """One rank has its loader begin behind other steps: it draws other samples, some of which another rank has, too."""
    its, model, called, optimizer = setup(
        "inside", noise_multiplier=1.0, sampling=None, sample_size=20, steps=9, expected_batch_size=10
    )
    loader = its.data_loader(TensorDataset(samples(20)))
    if rank == 1:
        loader.load_state_dict({**loader.state_dict(), "steps_done": 3})
    backward(called, next(iter(loader))[0])
    return attempts(model, optimizer.step)


def test_a_rank_whose_loader_took_another_state(pool):
    for (error,), kept in pool.run(2, elsewhere):
        assert error is not None and error[0] == "RanksError" and kept
        assert "rank 0: a step" in error[1] and "logical batch 0" in error[1] and "logical batch 3" in error[1]


class Norms(nn.Module):
    """Two parameters of one shape, which begin alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = nn.LayerNorm(3), nn.LayerNorm(3), nn.Linear(3, 1)

    def forward(self, x):
        return self.last(self.two(self.one(x)))


def other_order(rank, size, sharded):
    """As of a set, say."""
    its, model = engine(noise_multiplier=1.0, clipping="per_layer"), Norms()
    if sharded:
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("listed", "shards"))  # as in test_kept_back.py
        for part in model.children():
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    called, listed = its.compile(model), list(model.parameters())
    if rank == 1:
        listed[0], listed[2] = listed[2], listed[0]
    optimizer = its.attach(torch.optim.SGD(listed, lr=1.0))
    backward(called, share(rank, size))
    return text_of(optimizer.step), its.steps_done


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "copies of shards"])
def test_parameters_in_another_order(pool, sharded):
    """Sums of one would be added to those of the other, and copies of a shard would have noise of their own each."""
    for error, done in pool.run(2, other_order, sharded):
        assert error is not None and "ranks do not agree" in error and "order and shapes" in error and done == 0


def shares_a_graph(rank, size):
    """Where a twin was compiled before, nothing is compiled for this model, and no graph names its parameters."""
    its, model = engine(), mlp()
    if rank == 1:
        backward(its.compile(mlp()), share(rank, size))
    called, optimizer = its.compile(model), its.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    backward(called, share(rank, size))
    optimizer.step()
    return its.steps_done


def test_a_rank_that_shares_a_graph_with_another_model(pool):
    assert pool.run(2, shares_a_graph) == [1, 1]


def spent(rank, size):
    its, model, called, optimizer = setup("inside", noise_multiplier=1.0, steps=1)
    take_steps(its, called, optimizer, [share(rank, size)])
    backward(called, share(rank, size))
    return attempts(model, optimizer.step), its.steps_done, its.steps_left


def test_no_step_beyond_the_budget(pool):
    for ((error,), kept), done, left in pool.run(2, spent):
        assert kept and error is not None and error[0] == "BudgetExhaustedError" and (done, left) == (1, 0)


HALF = _MixedPrecision(param_dtype=torch.bfloat16)


def useless(rank, size, what, way):
    """What DistributedDataParallel would do itself."""
    its, model = engine(), mlp()
    settings = {"static_graph": {"static_graph": True}, "mixed_precision": {"mixed_precision": HALF}}.get(what, {})
    if way == "around":
        model = DistributedDataParallel(model, **settings)
        if what == "hook":
            _register(model)
        its.compile(model)
    else:
        model = DistributedDataParallel(its.compile(model), **settings)
        if what == "hook":
            _register(model)
        backward(model, samples())


def _register(ddp):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    ddp.register_comm_hook(None, allreduce_hook)


@pytest.mark.parametrize(
    ("what", "way"),
    [
        ("hook", "inside"),
        ("hook", "around"),
        ("static_graph", "inside"),
        ("static_graph", "around"),
        ("mixed_precision", "around"),  # its forward would need a GPU
    ],
)
def test_what_ddp_has_no_use_for(pool, what, way):
    for found in pool.outcomes(2, useless, what, way):
        assert found is not None and found.kind == "OptionError"
        assert ("a communication hook" if what == "hook" else f"{what}, which has no use here") in found.text


def joined(rank, size):
    its, model, called, optimizer = setup("around", noise_multiplier=1.0)
    with called.join():
        take_steps(its, called, optimizer, [share(rank, size)] * (1 + rank))


def test_ranks_that_join(pool):
    """One that has ended takes part in what DistributedDataParallel sends, and in no step of an engine."""
    for found in pool.outcomes(2, joined):
        assert found is not None and found.kind == "OptionError" and "join(), which has no use here" in found.text


def sharded_of_old(rank, size):
    its = engine(noise_multiplier=1.0)
    its.compile(FullyShardedDataParallel(mlp(), use_orig_params=True, device_id=torch.device("cpu")))


def test_what_fully_shard_has_replaced(pool):
    for found in pool.outcomes(1, sharded_of_old):
        assert found is not None and found.kind == "OptionError" and "apply fully_shard in its place" in found.text


def of_one_rank(rank, size):
    if rank == 0:
        engine()
    else:
        time.sleep(4)


def test_an_engine_on_one_rank_alone(pool):
    one, _ = pool.outcomes(2, of_one_rank, wait=3.0)
    assert one is not None and one.kind == "RanksError" and "every rank makes the same engine" in one.text


def loaders(rank, size, name, values):
    its = engine(sampling=None, sample_size=20)
    rows = values[rank] if name == "rows" else 20
    its.data_loader(TensorDataset(samples(rows)), **({} if name == "rows" else {name: values[rank]}))


@pytest.mark.parametrize(
    ("name", "values"), [("physical_batch_size", (2, 3)), ("read_ahead", (0, 1)), ("rows", (20, 19))], ids=str
)
def test_other_loaders(pool, name, values):
    one, other = pool.outcomes(2, loaders, name, values)
    assert one is not None and other is not None
    assert one.kind == "RanksError"
    if name == "rows":
        assert other.kind == "OptionError" and "rank 1 has failed: OptionError: dataset has 19 rows" in one.text
    else:
        assert other.kind == "RanksError" and "ranks do not agree" in one.text and name in one.text


def before_its_group(rank, size, way):
    """An engine that was made when there was one process only."""
    with mock.patch.object(torch.distributed, "is_initialized", return_value=False):
        its, model = engine(noise_multiplier=1.0), mlp()
        optimizer = its.attach(torch.optim.SGD(model.parameters(), lr=1.0))

    def train():
        called = its.compile(model) if way == "none" else DistributedDataParallel(its.compile(model))
        backward(called, share(rank, size))
        optimizer.step()

    return attempts(model, train)


@pytest.mark.parametrize("way", ["inside", "none"])
def test_an_engine_that_is_older_than_its_group(pool, way):
    for (error,), kept in pool.run(2, before_its_group, way):
        assert kept and error is not None and error[0] in ("OptionError", "RanksError"), "each would train for itself"


def schedules(rank, size, at):
    """Bounds that one rank moves otherwise, behind so many steps."""
    how = (lambda step: 0.5 if step == at else 1.0) if rank else (lambda step: 1.0)
    its, model, called, optimizer = setup("inside", bounds=how)
    backward(called, share(rank, size))
    return attempts(model, optimizer.step)


def test_bounds_that_begin_otherwise(pool):
    for found in pool.outcomes(2, schedules, 0):
        assert found[0] == "RanksError" and "rank 0: the engine's arguments: bounds(0)=1.0; " in found[1]


def test_bounds_that_move_otherwise(pool):
    for (error,), kept in pool.run(2, schedules, 1):
        assert kept and error is not None and error[0] == "RanksError" and "bounds: times 0.5" in error[1]


def other_state(rank, size, changed):
    """Engines are made by all ranks alike, so both of both configurations are made on both."""
    states = [engine(**settings).state_dict() for settings in ({}, changed)]
    its = engine()
    return attempts(mlp(), lambda: its.load_state_dict(states[rank]))


@pytest.mark.parametrize("changed", [{"max_grad_norm": 2.0}, {"noise_multiplier": 1.0}], ids=str)
def test_a_state_of_another_run_on_one_rank(pool, changed):
    (((one,), _), ((other,), _)) = pool.run(2, other_state, changed)
    assert other is not None and other[0] == "OptionError" and one is not None and one[0] == "RanksError"
    assert f"rank 1 has failed: OptionError: {next(iter(changed))} is" in one[1]
