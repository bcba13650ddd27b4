"""Keys of secure noise: no step twice, by no thread, process or rank; seeds replay."""

import gc
import multiprocessing
import os
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from flashdp_compile.runtime import secure_key
from flashdp_compile.runtime.secure_key import derived, fresh, next_key, shared


def draw(state, count):
    return [tuple(next_key(state).tolist()) for _ in range(count)]


def test_every_step_is_given_once():
    state = fresh("cpu")
    first = next_key(state)
    drawn = [tuple(first.tolist()), *draw(state, 9)]
    assert [step for *_, step in drawn] == list(range(10))
    assert len({key[:4] for key in drawn}) == 1
    assert first.tolist() == list(drawn[0]) and first.dtype == torch.int64 and first.shape == (5,)


def test_fresh_keys_use_all_bits():
    keys = [fresh("cpu").tolist() for _ in range(100)]
    for word in range(4):
        for bit in range(64):
            assert {(key[word] >> bit) & 1 for key in keys} == {0, 1}, (word, bit)
    assert {key[4] for key in keys} == {0}


def test_fresh_keys_come_from_the_operating_system(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(1, count + 1)))
    assert [word.to_bytes(8, "little") for word in fresh("cpu").tolist()[:4]] == [
        bytes(range(n, n + 8)) for n in (1, 9, 17, 25)
    ]


def test_derived_keys_replay_and_differ():
    arguments = [(0, "a"), (1, "a"), (-1, "a"), (10, "a"), (1, "0a"), (0, "b"), (2**70, ""), (0, "")]
    keys = {tuple(derived(*each).tolist()) for each in arguments}
    assert len(keys) == len(arguments)
    assert torch.equal(derived(7, "a"), derived(7, "a"))
    assert len({word for key in keys for word in key[:4]}) == 4 * len(keys)


def test_derived_keys_are_pinned():
    """Reproducibility over versions: a change here changes every replay."""
    assert derived(0, "test").tolist() == [
        2383184694415247293,
        -6426410843033992705,
        -5200016949455962778,
        -2087853259171628644,
        0,
    ]


@pytest.mark.parametrize("step", [2**62, 2**63 - 1, -1])
def test_steps_end_before_they_overflow(step):
    state = derived(0, "a")
    state[4] = step
    with pytest.raises(RuntimeError, match="2\\^62 steps"):
        next_key(state)
    assert state[4] == step
    state[4] = 2**62 - 1
    assert next_key(state)[4] == 2**62 - 1


def test_threads_share_no_step():
    state, drawn = fresh("cpu"), []
    threads = [threading.Thread(target=lambda: drawn.extend(draw(state, 200))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(step for *_, step in drawn) == list(range(1600))


def _drawn_in_child(pipe, *states):
    pipe.send([draw(state, 3) for state in states])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_its_own_keys():
    state, replay = fresh("cpu"), derived(0, "a")
    of_several = shared(os.urandom(32))
    context = multiprocessing.get_context("fork")
    answers = []
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        states = state, of_several, replay
        child = context.Process(target=_drawn_in_child, args=(sender, *states), daemon=True)
        with secure_key._lock:  # as if another thread were drawing
            child.start()
        assert receiver.poll(60), "the child waits for its parent's lock"
        answers.append(receiver.recv())
        child.join()
    own = [draw(s, 3) for s in (state, of_several, replay)]
    keys = [{key[:4] for key in drawn} for answer in (*answers, own) for drawn in answer[:2]]
    assert all(len(key) == 1 for key in keys) and len(set.union(*keys)) == 6
    assert answers[0][2:] == answers[1][2:] == own[2:]  # a seed is the user's: it replays in a child as well


def test_states_are_forgotten_with_their_tensors():
    gc.collect()  # what other tests have left counts no more
    before = len(secure_key._secret)
    states = [fresh("cpu") for _ in range(5)]
    assert len(secure_key._secret) == before + 5
    del states
    gc.collect()
    assert len(secure_key._secret) == before


def test_made_under_fake_tensors_and_inference_mode():
    with FakeTensorMode():
        states = [fresh("cpu"), derived(0, "a")]
    with torch.inference_mode():
        states += [fresh("cpu"), derived(0, "b")]
    assert len({key for state in states for key in draw(state, 2)}) == 8


@pytest.mark.gpu
def test_captured_draws_advance():
    state = fresh("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = next_key(state)
    seen = set()
    for _ in range(20):
        graph.replay()
        seen.add(tuple(drawn.tolist()))
    assert len(seen) == 20
    assert not seen & set(draw(state, 3))
