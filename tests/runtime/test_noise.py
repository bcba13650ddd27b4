"""Noise keys: no pair twice, whatever happens to the process or the compiler; seeds replay."""

import multiprocessing
import os

import pytest
import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

from flashdp_compile.errors import InternalError
from flashdp_compile.runtime import noise

draw_key = torch.ops.flashdp.draw_key
ANCHOR = torch.zeros(1)


def draw(count, seed=None, anchor=ANCHOR):
    return [tuple(draw_key(anchor, seed).tolist()) for _ in range(count)]


@pytest.fixture(autouse=True)
def fresh_states(monkeypatch):
    monkeypatch.setattr(noise.KEYS, "states", {})


@pytest.mark.parametrize("seed", [None, 7])
def test_no_pair_is_drawn_twice(seed):
    drawn = draw(300, seed)
    assert len(set(drawn)) == 300
    assert len({key for key, _ in drawn}) == 1
    assert [step - drawn[0][1] for _, step in drawn] == list(range(300))


def test_what_was_drawn_does_not_change():
    first = draw_key(ANCHOR, 7)
    before = first.tolist()
    draw(3, 7)
    assert first.tolist() == before
    assert first.dtype == torch.int64 and first.shape == (2,)


def test_seeds_replay_after_a_reset():
    drawn = draw(5, 7)
    noise.KEYS.reset()
    assert draw(5, 7) == drawn


def test_unseeded_keys_are_new_after_a_reset():
    drawn = draw(5)
    noise.KEYS.reset()
    assert {key for key, _ in drawn}.isdisjoint(key for key, _ in draw(5))


def test_reset_keeps_the_address():
    """Captured graphs refer to it."""
    draw(1, 7)
    address = next(iter(noise.KEYS.states.values())).data_ptr()
    noise.KEYS.reset()
    assert next(iter(noise.KEYS.states.values())).data_ptr() == address


def test_preparing_again_does_not_start_again():
    noise.KEYS.prepare("cpu", 7)
    drawn = draw(2, 7)
    noise.KEYS.prepare(torch.device("cpu"), 7)
    assert not set(drawn) & set(draw(2, 7))


def test_seeds_and_devices_differ():
    seeds = [None, 0, 1, -1, 10, 2**63 - 1]
    keys = {draw(1, seed)[0] for seed in seeds}
    assert len({key for key, _ in keys}) == len({step for _, step in keys}) == len(seeds)
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1")]
    assert len({tuple(noise.KEYS.fresh(device, 7).tolist()) for device in devices}) == 3


def test_seeded_keys_are_pinned():
    """Reproducibility over versions: a change here changes every seeded run."""
    assert draw(1, 0) == [(8097509351166302399, 4074257467051808636)]


def test_keys_use_all_bits():
    drawn = [noise.KEYS.fresh(torch.device("cpu"), None).tolist() for _ in range(200)]
    for word, bits in ((0, 64), (1, 62)):
        for bit in range(bits):
            assert {(pair[word] >> bit) & 1 for pair in drawn} == {0, 1}, (word, bit)
    assert all(0 <= step < 2**62 for _, step in drawn)


def _drawn_in_child(pipe):
    pipe.send((draw(20), draw(2, 7)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_children_draw_their_own():
    draw(1), draw(1, 7)
    context = multiprocessing.get_context("fork")
    answers = []
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_drawn_in_child, args=(sender,))
        child.start()
        answers.append(receiver.recv())
        child.join()
    unseeded = [*answers[0][0], *answers[1][0], *draw(20)]
    assert len({key for key, _ in unseeded}) == 3
    assert len(set(unseeded)) == 60
    assert answers[0][1] == answers[1][1] == draw(2, 7)  # a seed is the user's: it replays in a child as well


def test_draws_are_neither_merged_nor_dropped_to_one():
    def two(anchor):
        return draw_key(anchor, 7), draw_key(anchor, 7)

    graph = make_fx(two)(ANCHOR).graph
    targets = [node.target for node in fx_graph_cse(graph).nodes]
    assert targets.count(draw_key.default) == 2
    assert torch.Tag.nondeterministic_seeded in draw_key.default.tags


def test_compiled_draws_advance():
    noise.KEYS.prepare("cpu", 7)
    compiled = torch.compile(lambda anchor: draw_key(anchor, 7) + 0, backend="aot_eager", fullgraph=True)
    drawn = {tuple(compiled(ANCHOR).tolist()) for _ in range(5)}
    assert len(drawn) == 5
    noise.KEYS.reset()
    assert drawn == set(draw(5, 7))


def test_prepared_under_fake_tensors_and_inference_mode():
    """The backend may be called with either switched on; the state must be an ordinary tensor all the same."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        noise.KEYS.prepare("cpu", 7)
    with torch.inference_mode():
        noise.KEYS.prepare("cpu", 8)
    assert len({*draw(2, 7), *draw(2, 8)}) == 4


def test_the_operator_is_declared_correctly():
    torch.library.opcheck(draw_key.default, (ANCHOR, 7), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_captured_draws_advance():
    noise.KEYS.prepare("cuda", None)
    anchor = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw_key(anchor, None)
    seen = set()
    for _ in range(20):
        graph.replay()
        seen.add(tuple(drawn.tolist()))
    assert len(seen) == 20
    assert not seen & set(draw(3, None, anchor))


@pytest.mark.gpu
def test_unprepared_capture_is_an_error():
    anchor = torch.zeros(1, device="cuda")
    with pytest.raises(InternalError, match="before graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        draw_key(anchor, 99)
