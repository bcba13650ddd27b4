"""Samples do not mix: NaN stays where it is, weight 0 and excluded positions are not read."""

import pytest
import torch
from kernel_cases import arguments, outputs

from flashdp_compile.kernels import FAMILIES, tuning

POISONS = [float("nan"), float("inf")]
both = pytest.mark.parametrize("path", ["launch", "reference"])


@both
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["product_sum", "weighted_matmul", "embedding_sum"])
def test_weight_zero_is_not_read(name, poison, path, device):
    family = FAMILIES[name]
    args = arguments(family, family.cases[1], device=device)
    clean = getattr(family, path)(*args)
    for t in args:
        if isinstance(t, torch.Tensor) and t.dim() == 3:
            t[1::3] = poison  # the samples whose example weight is 0
    assert torch.equal(getattr(family, path)(*args), clean)


@pytest.mark.parametrize("scales", [(0, 60, -64, None, 20, -60, 64), (64, None, -60), (-60, 64, None, 0)], ids=str)
@pytest.mark.parametrize("path", ["launch", "reference"])
def test_samples_whose_norms_are_far_apart_count_the_same(path, scales, device):
    """Each is worth as much in the sum, whatever came before it: as far as clip.py lets norms go."""
    x, g, _ = arguments(FAMILIES["weighted_matmul"], (len(scales), 40, 24, 17), device=device)
    g, dropped = g / 40, torch.tensor([s is None for s in scales], device=device)
    exponents = torch.tensor([s or 0.0 for s in scales], device=device, dtype=torch.float32)
    weights = torch.where(dropped, 0.0, (-exponents).exp2())
    expected = torch.einsum("btd,btp->dp", x[~dropped].double(), g[~dropped].double())
    found = getattr(FAMILIES["weighted_matmul"], path)(x, g * exponents.exp2()[:, None, None], weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_rounding_of_ratios_does_not_add_up(device, monkeypatch):
    """Two weights in turn, whose ratios, both ways, are rounded up: 512 samples in one run, and one that counts."""
    monkeypatch.setattr(tuning, "processors", lambda device: 1)
    weights = torch.tensor([0.1191243, 0.118871816], device=device).repeat(256)
    x, g = torch.zeros(512, 1, 1, device=device), torch.zeros(512, 1, 1, device=device)
    x[0], g[0] = 1.0, 1.0
    found = FAMILIES["weighted_matmul"].launch(x, g, weights)
    assert found.item() == pytest.approx(weights[0].item(), rel=2.0**-18)


@both
@pytest.mark.parametrize("name", ["product_sum", "weighted_matmul", "embedding_sum"])
def test_all_weights_zero(name, path, device):
    family = FAMILIES[name]
    args = arguments(family, family.cases[0], device=device)
    args = tuple(torch.zeros_like(t) if isinstance(t, torch.Tensor) and t.dim() == 1 else t for t in args)
    assert (getattr(family, path)(*args) == 0).all()


@both
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    "name", ["gram_sqnorm", "outer_sqnorm", "outer_store", "embedding_sqnorm", "tied_cross", "stored_cross"]
)
def test_a_poisoned_sample_spoils_its_own_norm_only(name, poison, path, device):
    family = FAMILIES[name]
    args = arguments(family, family.cases[0], device=device)
    clean = outputs(getattr(family, path)(*args))[-1]
    if args[0].dtype == torch.int64:
        args[0][1, 2] = 0  # so that the poisoned position counts
    target = args[1][0] if isinstance(args[1], list) else args[1]
    target[1, 2, :] = poison
    spoilt = outputs(getattr(family, path)(*args))[-1]
    assert not spoilt[1].isfinite()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


@both
@pytest.mark.parametrize("poison", POISONS)
def test_vectors_of_weight_zero_are_not_read(poison, path, device):
    values, *rest = arguments(FAMILIES["vector_sums"], (5, 130, 3), device=device)
    clean = getattr(FAMILIES["vector_sums"], path)(values, *rest)
    for v in values:
        v[1::3] = poison
    for now, was in zip(getattr(FAMILIES["vector_sums"], path)(values, *rest), clean, strict=True):
        assert torch.equal(now, was)


@both
@pytest.mark.parametrize("name", ["embedding_sqnorm", "embedding_sum", "tied_cross", "stored_cross"])
def test_excluded_positions_are_not_read(name, path, device):
    family = FAMILIES[name]
    args = arguments(family, family.cases[0], device=device)
    args[0][:, 1] = -1
    clean = getattr(family, path)(*args)
    args[1][:, 1] = float("nan")
    assert torch.equal(getattr(family, path)(*args), clean)
    args[0].fill_(-1)
    assert (getattr(family, path)(*args) == 0).all()


@pytest.mark.parametrize(
    "name", ["gram_sqnorm", "outer_sqnorm", "outer_store", "embedding_sqnorm", "tied_cross", "stored_cross"]
)
def test_a_sample_alone_gives_the_same_bits(name, device):
    family = FAMILIES[name]
    args = arguments(family, family.cases[1], device=device)
    together = outputs(family.launch(*args))
    alone = [t[1:2] if isinstance(t, torch.Tensor) else t for t in args]
    if isinstance(args[1], list) and isinstance(args[1][0], torch.Tensor):
        alone[1] = [t[1:2] for t in args[1]]
    for a, b in zip(together, outputs(family.launch(*alone)), strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-7, atol=0)


def test_overflow_of_a_stored_product_is_seen_in_its_norm(device):
    x = torch.full((2, 4, 3), 300.0, dtype=torch.float16, device=device)
    x[0] = 1
    _, sqnorm = FAMILIES["outer_store"].launch(x, x)
    assert sqnorm[0].isfinite() and sqnorm[1].isinf()
