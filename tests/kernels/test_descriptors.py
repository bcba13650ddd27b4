"""The path of an H100, tiles read and stored by TMA descriptors, in the interpreter: the values that pointers give."""

import pytest
import torch
from kernel_cases import arguments, lay, outputs

from flashdp_compile.kernels import FAMILIES, guard, hopper, tuning, weighted_matmuls
from flashdp_compile.kernels.operands import INNER, STRIDED, TMA, layout

# B, T, d, p: rows of 16-byte multiples, no size a multiple of a tile
SHAPES = [(2, 72, 136, 264), (3, 140, 24, 8), (1, 5, 264, 520)]


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(hopper, "available", lambda device: False)  # the templates that an interpreter runs


@pytest.mark.parametrize("entry", [0, -1], ids=["large_tiles", "small_tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gram_sqnorm", "outer_sqnorm", "outer_store", "weighted_matmul"])
def test_descriptors_read_what_pointers_read(name, shape, dtype, entry, device, monkeypatch):
    family = FAMILIES[name]
    args = arguments(family, shape, dtype, device)
    *tiles, _ = tuning._table()["sm_90"][name]["16"][entry]
    monkeypatch.setattr(tuning, "tiles", lambda *sizes: tuning.Tiles(*tiles))
    assert TMA in repr(family.specialise(*args))
    by_descriptor = outputs(family.launch(*args))
    monkeypatch.setattr(tuning, "has_tma", lambda device: False)
    assert TMA not in repr(family.specialise(*args))
    for got, expected in zip(by_descriptor, outputs(family.launch(*args)), strict=True):
        # other tiles, so another order of summation
        rounding = max(1e-6, torch.finfo(got.dtype).eps)
        torch.testing.assert_close(got, expected, rtol=rounding, atol=1e-5)


SEVERAL = {
    "gram_sqnorms": [(2, 140, 3, 24, 8, 16, 136, 72, 264, 24, 8, 16), (9, 5, 2, 8, 16)],
    "weighted_matmuls": [(3, 140, 24, 8, 136, 264, 24, 8), (2, 5, 264, 520)],
}


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("name, case", [(name, case) for name, cases in SEVERAL.items() for case in cases])
def test_kernels_of_several_layers_make_their_own_descriptors(name, case, processors, device, monkeypatch):
    """Many processors: samples are summed in runs."""
    monkeypatch.setattr(tuning, "processors", lambda device: processors)
    family = FAMILIES[name]
    args = arguments(family, case, torch.bfloat16, device)
    assert family.supports(*args) and TMA in repr(family.specialise(*args))
    by_descriptor, twin = family.launch(*args), family.reference(*args)
    for got, expected in zip(outputs(by_descriptor), outputs(twin), strict=True):
        # tensor cores truncate: up to 1e-6 of the absolute sum, some 400; a tile of another layer is off by 20
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


def test_what_a_descriptor_cannot_read_is_read_by_pointers(device):
    t = torch.randn(2, 6, 24, device=device).bfloat16()
    assert layout(t) == TMA
    assert layout(t.float()) == INNER  # 32 bits: no fast product
    assert layout(lay(t, "last_strided")) == STRIDED
    assert layout(t[:, :, 1:]) == INNER  # starts between two multiples of 16 bytes
    assert layout(t[:, :, :23].contiguous()) == INNER  # rows of 46 bytes
    assert layout(t[:1].expand(2, 6, 24)) == INNER  # one sample's memory for all
    assert layout(t[:, :, 8:]) == TMA


def test_tiles_depend_on_the_product_and_not_on_the_batch(device):
    small, large = (tuning.tiles("outer_store", torch.bfloat16, torch.device(device), (n, n)) for n in (256, 4096))
    assert small.columns < large.columns
    for batch in (1, 64):
        args = arguments(FAMILIES["outer_sqnorm"], (batch, 8, 16, 16), torch.bfloat16, device)
        assert FAMILIES["outer_sqnorm"].specialise(*args) == FAMILIES["outer_sqnorm"].specialise(*(t[:1] for t in args))


def test_the_norm_and_the_sum_are_of_one_product(device):
    """Whose entries are summed in the same order, in blocks of one depth."""
    for table in tuning._table().values():
        for bits in ("16", "32"):
            assert len({e[2] for family in ("outer_sqnorm", "weighted_matmul") for e in table[family][bits]}) == 1
    x, g, weights = arguments(FAMILIES["weighted_matmul"], (3, 40, 264, 136), torch.bfloat16, device)
    alone = FAMILIES["weighted_matmul"].launch(x[:1], g[:1], torch.ones(1, device=device))
    sqnorm = FAMILIES["outer_sqnorm"].launch(x[:1], g[:1])
    assert torch.allclose(alone.double().square().sum(), sqnorm.double(), rtol=1e-6)


def test_samples_are_cut_into_runs_where_tiles_alone_leave_processors_idle():
    """For the layers of GPT-2, two programs on each of 132 multiprocessors; partial sums are not free."""
    assert [weighted_matmuls.runs(16, 1024, tiles, 264) for tiles in (108, 144, 36, 2358)] == [2, 3, 6, 1]
    assert [weighted_matmuls.runs(64, 256, tiles, 264) for tiles in (108, 144, 36, 2358)] == [2, 5, 7, 1]


def test_tensor_cores_sum_no_more_by_themselves_than_the_guard_allows():
    tables = tuning._table().values()
    assert all(depth <= guard.BLOCK for t in tables for e in t["gram_sqnorm"].values() for _, _, depth, *_ in e)


def test_blocks_are_as_deep_as_the_tokens_fill():
    """Of 197 tokens four blocks of 64 would be a quarter empty."""
    tiles = tuning.Tiles(128, 128, 64, 4, 3)
    assert tuning.for_tokens(tiles, 197) == tiles._replace(depth=32, stages=5)
    assert tuning.for_tokens(tiles, 256) == tuning.for_tokens(tiles, 250) == tiles
    small = tuning.Tiles(64, 64, 32, 4, 2)
    assert tuning.for_tokens(small, 5) == small
