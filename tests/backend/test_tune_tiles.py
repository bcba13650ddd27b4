"""`autotune=True` on a device that `tuning.json` does not know: its tiles are tried once and kept."""

import json

import pytest
import torch

from flashdp_compile import autotune, tune_tiles
from flashdp_compile.kernels import tuning
from flashdp_compile.kernels.tuning import Tiles

CPU = torch.device("cpu")
A, B, C = Tiles(64, 64, 32, 4, 2), Tiles(128, 128, 32, 4, 3), Tiles(128, 128, 64, 4, 3)


@pytest.fixture(autouse=True)
def unknown_device(tmp_path, monkeypatch):
    """A GPU of an architecture that is not in the table."""
    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_999")
    yield
    tuning._table().pop("sm_999", None)
    tuning._learned.clear()


def taken(family, dtype=torch.bfloat16):
    return tuning.tiles(family, dtype, CPU, (1024, 1024))


def test_what_is_learned_replaces_the_default():
    before, key = taken("gram_sqnorm"), tuning.learned()
    tuning.learn(CPU, {"outer_store": {16: C}})
    assert tuning.is_known(CPU) and tuning.learned() != key
    assert taken("outer_store") == C and taken("gram_sqnorm") == before
    assert taken("outer_store", torch.float32) == Tiles(*tuning._table()["default"]["outer_store"]["32"][0][:-1])


def test_a_trial_leaves_nothing_behind():
    key, before = tuning.learned(), taken("outer_store")
    with tuning.trying(CPU, "outer_store", 16, C):
        assert taken("outer_store") == C
    assert not tuning.is_known(CPU) and tuning.learned() == key and taken("outer_store") == before


def test_the_fastest_of_each_with_one_depth_for_norms_and_sums_of_one_product():
    """A 32 deep norm is fastest, but the sum that must go with it is so slow that both are taken 64 deep."""
    never = float("inf")
    seconds = {
        "outer_sqnorm": {A: 1.0, B: 2.0, C: 3.0},
        "weighted_matmul": {A: 9.0, B: 8.0, C: 1.0},
        "outer_store": {A: 2.0, C: 1.0},
        "gram_sqnorm": {A: never, C: never},
    }
    assert tune_tiles._fastest(seconds) == {"outer_sqnorm": C, "weighted_matmul": C, "outer_store": C}


def test_sizes_that_fail_or_are_wrong_are_never_taken(monkeypatch):
    def trial(value):
        launch = (lambda x: value) if isinstance(value, torch.Tensor) else (lambda x: 1 / 0)
        family = type("", (), {"launch": staticmethod(launch), "reference": staticmethod(lambda x: torch.ones(3))})
        monkeypatch.setitem(tune_tiles.FAMILIES, "tried", family)
        return tune_tiles._seconds(("tried", (1,)), CPU, "outer_store", 16, C)

    monkeypatch.setattr(autotune, "SECONDS", 0.002)
    assert 0 < trial(torch.ones(3)) < 1
    assert trial(torch.tensor([1.0, 1.0, 1.1])) == trial(torch.full((3,), torch.nan)) == trial(None) == float("inf")


def test_no_cpu_and_no_known_device_is_tried(monkeypatch):
    monkeypatch.setattr(tune_tiles, "_measured", lambda device: pytest.fail("measured"))
    tune_tiles.tune_tiles(CPU, "sources")
    tuning.learn(CPU, {})
    tune_tiles.tune_tiles(torch.device("cuda", 0), "sources")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    device = torch.device("cuda", 0)
    tune_tiles.tune_tiles(device, "sources")
    (file,) = tmp_path.rglob("*.json")
    found = json.loads(file.read_text())["tiles"]
    assert found.keys() == tune_tiles._trials(16, device).keys()
    for family, by_bits in found.items():
        assert all(Tiles(*sizes) in tuning.candidates(family, int(bits)) for bits, sizes in by_bits.items())
        assert taken(family) == Tiles(*by_bits["16"])
    tuning._table().pop("sm_999")
    monkeypatch.setattr(tune_tiles, "_measured", lambda device: pytest.fail("measured again"))
    tune_tiles.tune_tiles(device, "sources")
    assert taken("outer_store") == Tiles(*found["outer_store"]["16"])
