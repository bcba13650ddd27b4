"""A run that is resumed goes on; what was spent stays spent, and no noise is drawn twice, whatever was killed."""

import gc
import json
import os
import random
import signal
import struct
import time

import pytest
import torch

from engine.runs import backward, copies, engine, mlp, samples
from flashdp_compile import OptionError
from flashdp_compile.engine.journal import RESERVED, Journal
from flashdp_compile.engine.noise import NOISES, SecureNoise


def run(its, model, optimizer, steps):
    compiled = its.compile(model)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(compiled, samples())
        optimizer.step()


def begun(**settings):
    its, model = engine(noise_multiplier=1.0, seed=5, **settings), mlp()
    return its, model, its.attach(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def test_a_resumed_run_is_an_unbroken_one():
    its, model, optimizer = begun()
    run(its, model, optimizer, 5)
    whole = copies(model)

    its, model, optimizer = begun()
    run(its, model, optimizer, 2)
    saved = json.loads(json.dumps(its.state_dict())), model.state_dict(), optimizer.state_dict()
    its, model, optimizer = begun()
    for part, state in zip((its, model, optimizer), saved, strict=True):
        part.load_state_dict(state)
    run(its, model, optimizer, 3)
    assert its.steps_done == 5
    assert all(torch.equal(a, b) for a, b in zip(whole, model.parameters(), strict=True))


@pytest.mark.parametrize("noise", NOISES)
def test_without_a_seed_noise_is_drawn_anew_after_loading(noise):
    its = engine(noise_multiplier=1.0, noise=noise)
    total = torch.zeros(100)
    (before,) = its._steps.noise.add([total], 1, [0], 1.0)
    its.load_state_dict(its.state_dict())
    assert not torch.equal(before, its._steps.noise.add([total], 1, [0], 1.0)[0])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"noise_multiplier": 2.0}, "noise_multiplier"),
        ({"max_grad_norm": 2.0}, "max_grad_norm"),
        ({"clipping": "per_layer"}, "clipping"),
        ({"expected_batch_size": 4}, "expected_batch_size"),
        ({"steps": 7}, "steps"),
        ({"seed": 1}, "seed"),
        ({"noise": "philox"}, "noise"),
    ],
)
def test_another_mechanism_is_not_resumed(changed, named, tmp_path):
    its = engine(journal=tmp_path / "run.json")
    its._budget._journal.reserve(1, None)
    with pytest.raises(OptionError, match=f"^{named} is"):
        engine(**changed).load_state_dict(its.state_dict())
    del its
    with pytest.raises(OptionError, match=f"journal=.* with {named}="):
        engine(**changed, journal=tmp_path / "run.json")


def test_one_run_at_a_time(tmp_path):
    its = engine(journal=tmp_path / "run.json")
    with pytest.raises(OptionError, match="is in use by another run"):
        engine(journal=tmp_path / "run.json")
    del its
    engine(journal=tmp_path / "run.json")
    with pytest.raises(OptionError, match="cannot be written"):
        engine(journal=tmp_path / "nowhere" / "run.json")


def test_what_a_checkpoint_does_not_know_is_in_the_journal(tmp_path):
    path = tmp_path / "run.json"
    its, model, optimizer = begun(journal=path)
    run(its, model, optimizer, 2)
    saved = its.state_dict()
    assert json.loads(path.read_text())["spent"] == 2  # exactly
    run(its, model, optimizer, 1)  # and then the process dies
    del its, optimizer
    gc.collect()
    again, *_ = begun(journal=path)
    again.load_state_dict(saved)
    assert again.steps_done == again.plan.steps - again.steps_left == 2 + RESERVED


def test_no_more_is_reserved_than_the_run_may_take(tmp_path):
    its, model, optimizer = begun(journal=tmp_path / "run.json", steps=3)
    run(its, model, optimizer, 1)
    assert json.loads((tmp_path / "run.json").read_text())["spent"] == 3


def test_a_file_that_is_no_journal(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(OptionError, match="cannot be read as a journal"):
        engine(journal=tmp_path / "run.json")


def take_steps(path, pipe):
    """What a process does until it is killed: a step is reserved, its noise drawn, and told to the parent."""
    torch.set_num_threads(1)
    journal, noise = Journal(path, {}), SecureNoise(None)
    step = journal.spent
    while True:
        step += 1
        journal.reserve(step, None)
        (draw,) = noise.add([torch.zeros(8)], step, [0], 1.0)
        os.write(pipe, struct.pack("<q8f", step, *draw.tolist()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills its children")
def test_fifty_kills(tmp_path):
    """Nothing spent is lost and no draw is repeated, whenever the process dies."""
    path, times, record = tmp_path / "run.json", random.Random(0), struct.Struct("<q8f")
    SecureNoise(None).add([torch.zeros(8)], 0, [0], 1.0)  # loads what a child would have to load
    seen: set[tuple] = set()
    last = taken = 0
    for _ in range(50):
        receive, send = os.pipe()
        if (child := os.fork()) == 0:
            try:
                take_steps(path, send)
            finally:
                os._exit(1)
        os.close(send)
        told = os.read(receive, record.size)  # it is under way
        time.sleep(times.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(receive, 1 << 16):
            told += more
        os.close(receive)
        draws = [record.unpack_from(told, at) for at in range(0, len(told) - record.size + 1, record.size)]
        assert draws and draws[0][0] > last
        for _, *draw in draws:
            assert tuple(draw) not in seen
            seen.add(tuple(draw))
        taken += len(draws)
        spent = Journal(path, {}).spent
        assert draws[-1][0] <= spent <= draws[-1][0] + RESERVED + 1
        last = spent
    assert taken > 100 and len(seen) == taken
