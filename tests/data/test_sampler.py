"""Logical batches, their micro-batches, seeds, and going on after an interruption."""

import logging
import pickle

import pytest

from flashdp_compile import accounting
from flashdp_compile.data import MicroBatch, PoissonSampler, sampler as module
from flashdp_compile.errors import OptionError

RUN = {"sample_size": 50, "sample_rate": 0.2, "steps": 12}


def sampler(**changes):
    return PoissonSampler(**{**RUN, "seed": 7, **changes})


def received(one):
    """[[indices of each micro-batch] of each logical batch], taken one by one."""
    logical = [[]]
    for batch in one:
        logical[-1].append(batch)
        found = one.received()
        assert found.size == len(batch)
        if found.last:
            logical.append([])
    assert logical.pop() == []
    return logical


def test_plain_lists_of_plain_integers():
    for batch in sampler():
        assert type(batch) is list and all(type(index) is int for index in batch)
        assert pickle.loads(pickle.dumps(batch)) == batch


@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("physical", [None, 1, 4, 50, 60])
def test_micro_batches_make_up_the_logical_batches(rate, physical):
    whole = list(sampler(sample_rate=rate))
    parts = received(sampler(sample_rate=rate, physical_batch_size=physical))
    assert len(parts) == RUN["steps"]
    assert [sum(logical, []) for logical in parts] == whole
    for logical in parts:
        full = physical or 50
        assert all(len(batch) == full for batch in logical[:-1])
        assert len(logical[-1]) <= full and (logical[-1] or logical == [[]])
    if rate == 0.01:
        assert [[]] in parts  # the case that this rate is here for


def test_no_steps():
    assert list(sampler(steps=0)) == []


def test_seeds():
    assert list(sampler()) == list(sampler())
    assert list(sampler(seed=8)) != list(sampler())
    batches = list(sampler(sample_size=1000, sample_rate=0.5))
    assert len({tuple(sorted(batch)) for batch in batches}) == RUN["steps"]


def test_without_a_seed_every_pass_is_new():
    one = sampler(seed=None, sample_size=1000)
    assert list(one) != list(one)
    assert list(sampler(seed=None, sample_size=1000)) != list(sampler(seed=None, sample_size=1000))


def test_a_seed_is_warned_of_once(caplog):
    module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="flashdp_compile"):
        sampler(seed=None)
        assert not caplog.records
        sampler()
        sampler()
    (record,) = caplog.records
    assert record.name == "flashdp_compile" and "who took part" in record.message and "7" not in record.message


def test_the_record_is_of_the_newest_iteration():
    one = sampler(physical_batch_size=1, sample_rate=0.5)
    first = iter(one)
    next(first)
    second = iter(one)
    with pytest.raises(RuntimeError, match="none is left"):
        one.received()
    next(first)  # goes on reading, which concerns nobody
    next(second)
    assert one.received() == MicroBatch(1, False)
    with pytest.raises(RuntimeError, match="none is left"):
        one.received()


@pytest.mark.parametrize("micro_batches", range(0, 40, 3))
def test_going_on_anywhere_draws_what_an_unbroken_run_does(micro_batches):
    unbroken = received(sampler(physical_batch_size=3))
    one, batches = sampler(physical_batch_size=3), []
    ahead = iter(one)
    for _ in range(micro_batches):
        batches.append(next(ahead))
        one.received()
    next(ahead), next(ahead)  # read ahead, and never received
    state = pickle.loads(pickle.dumps(one.state_dict()))
    done = state["steps_done"]
    assert sum(map(len, unbroken[:done])) <= micro_batches < sum(map(len, unbroken[: done + 1]))
    other = sampler(physical_batch_size=3)
    other.load_state_dict(state)
    assert received(other) == unbroken[done:]
    larger = sampler(physical_batch_size=8)  # has no part in what is drawn
    larger.load_state_dict(state)
    assert [sum(logical, []) for logical in received(larger)] == [sum(logical, []) for logical in unbroken[done:]]


def test_a_pickled_sampler_goes_on():
    one = sampler()
    ahead = iter(one)
    for _ in range(5):
        next(ahead)
        one.received()
    assert received(pickle.loads(pickle.dumps(one))) == received(sampler())[5:]


def test_without_a_seed_only_the_step_goes_on():
    one, other = (sampler(seed=None, sample_size=1000) for _ in range(2))
    ahead = iter(one)
    for _ in range(5):
        next(ahead)
        one.received()
    other.load_state_dict(one.state_dict())
    rest = list(other)
    assert len(rest) == RUN["steps"] - 5
    assert rest != list(ahead)


@pytest.mark.parametrize(
    "change",
    [{"sample_size": 51}, {"sample_rate": 0.21}, {"steps": 13}, {"cap": 9}, {"seed": 8}, {"seed": None}],
    ids=lambda change: next(iter(change)),
)
def test_the_state_of_another_run_is_refused(change):
    (name,) = change
    state, one = sampler(**change).state_dict(), sampler()
    with pytest.raises(OptionError, match=f"^{name}\\b"):
        one.load_state_dict({**state, "steps_done": 3})
    assert one.steps_done == 0


def test_what_is_not_a_state_is_refused():
    state = sampler().state_dict()
    with pytest.raises(OptionError, match="no cap"):
        sampler().load_state_dict({name: value for name, value in state.items() if name != "cap"})
    for done in (-1, RUN["steps"] + 1, 1.5):
        with pytest.raises(OptionError, match="^steps_done="):
            sampler().load_state_dict({**state, "steps_done": done})


def test_the_state_does_not_hold_the_seed():
    seed = 2**62 + 12345
    assert seed not in sampler(seed=seed).state_dict().values()
    assert sampler(seed=seed).state_dict()["seed_check"] < 2**16


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 12),
        ({"physical_batch_size": 50}, 12),
        ({"physical_batch_size": 8, "cap": 8}, 12),
        ({"physical_batch_size": 8, "cap": 9}, None),
        ({"physical_batch_size": 49}, None),
    ],
)
def test_a_length_where_there_is_one(changes, expected):
    if expected is None:
        with pytest.raises(TypeError, match="physical_batch_size"):
            len(sampler(**changes))
    else:
        one = sampler(**changes)
        assert len(one) == expected == len(list(one))
        one.received()
        assert len(one) == 11 == len(list(one))


def test_what_was_drawn_in_the_words_of_the_accounting():
    assert sampler().sampling == accounting.Poisson(0.2, 50)
    assert sampler(cap=9).sampling == accounting.TruncatedPoisson(0.2, 9, 50)


@pytest.mark.parametrize(
    "name, values",
    [
        ("sample_size", [0, -1, 2.0, None]),
        ("sample_rate", [0, 1.01, -0.1, True, "0.1", float("nan")]),
        ("steps", [-1, 1.5, None]),
        ("physical_batch_size", [0, 2.5]),
        ("cap", [0, 2.5]),
        ("seed", [-1, 1.5, "1"]),
    ],
)
def test_values_that_are_not_allowed(name, values):
    for value in values:
        with pytest.raises(OptionError, match=f"^{name}="):
            sampler(**{name: value})
