"""Keys of probes: a new one for each release, the same within one, and never that of the noise."""

import pytest
import torch

from flashdp_compile.runtime import noise, probe_keys

ANCHOR = torch.zeros(1)


@pytest.fixture(autouse=True)
def fresh_states(monkeypatch):
    monkeypatch.setattr(noise.KEYS, "states", {})
    monkeypatch.setattr(probe_keys.KEYS, "states", {})


def draw(seed=None, hold=False):
    return tuple(torch.ops.flashdp.draw_probe_key(ANCHOR, seed, hold).tolist())


@pytest.mark.parametrize("seed", [None, 7])
def test_every_draw_is_new(seed):
    assert len({draw(seed) for _ in range(50)}) == 50


def test_held_keys_stay_until_the_release():
    first = draw(hold=True)
    assert draw(hold=True) == first
    probe_keys.KEYS.advance()
    second = draw(hold=True)
    assert second != first == (second[0], second[1] - 1)


def test_equal_seeds_give_equal_keys_on_all_devices():
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "cuda:1")]
    assert len({tuple(probe_keys.KEYS.fresh(device, 7).tolist()) for device in devices}) == 1


def test_a_seed_gives_probes_and_noise_different_keys():
    """Equal ones would publish the noise: probes are no secret."""
    cpu = torch.device("cpu")
    assert not set(probe_keys.KEYS.fresh(cpu, 7).tolist()) & set(noise.KEYS.fresh(cpu, 7).tolist())


def test_the_operator_is_declared_correctly():
    op = torch.ops.flashdp.draw_probe_key.default
    torch.library.opcheck(op, (ANCHOR, 7, True), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in op.tags
