"""Keys of probes: a new one for each release, the same within one, and never that of the noise."""

import pytest
import torch

from flashdp_compile.runtime import noise, probe_keys
from flashdp_compile.runtime.probe_keys import HeldProbes

ANCHOR = torch.zeros(1)


@pytest.fixture(autouse=True)
def fresh_states(monkeypatch):
    monkeypatch.setattr(noise.KEYS, "states", {})
    monkeypatch.setattr(probe_keys.KEYS, "states", {})


def draw(seed=None, place=None):
    return tuple(torch.ops.flashdp.draw_probe_key(ANCHOR, seed, place).tolist())


@pytest.mark.parametrize("seed", [None, 7])
def test_every_draw_is_new(seed):
    assert len({draw(seed) for _ in range(50)}) == 50


def test_held_keys_stay_until_the_release():
    held, other = (HeldProbes("hutchinson", 16, 1) for _ in range(2))
    first, beside = draw(place=held.place), draw(place=other.place)
    draw(), other.move()
    assert draw(place=held.place) == first and draw(place=other.place) == (beside[0], beside[1] + 1)
    held.move()
    assert draw(place=held.place) == (first[0], first[1] + 1) and held.moves == 1
    assert first[0] != beside[0], "each engine has its own"


@pytest.mark.parametrize("seed", [None, 7])
def test_all_devices_of_an_engine_have_the_same_probes(seed):
    keys = HeldProbes("hutchinson", 16, 1, seed).keys
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1")]
    assert len({tuple(keys.fresh(device, seed).tolist()) for device in devices}) == 1
    keys.prepare("cpu", seed)
    keys.advance()
    now = keys.draw(torch.device("cpu"), seed, hold=True)
    keys.states.clear()  # as for a device that is met later
    assert torch.equal(keys.draw(torch.device("cpu"), seed, hold=True), now)


def test_a_seed_gives_probes_and_noise_different_keys():
    """Equal ones would publish the noise: probes are no secret."""
    cpu = torch.device("cpu")
    assert not set(probe_keys.KEYS.fresh(cpu, 7).tolist()) & set(noise.KEYS.fresh(cpu, 7).tolist())


def test_the_operator_is_declared_correctly():
    op = torch.ops.flashdp.draw_probe_key.default
    torch.library.opcheck(op, (ANCHOR, 7, None), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in op.tags
