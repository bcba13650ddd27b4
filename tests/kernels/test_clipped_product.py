"""A layer in parts: the same as by all samples at once, whatever the parts."""

import pytest
import torch
from kernel_cases import arguments

from flashdp_compile.kernels import FAMILIES, outer_store, product_sums
from flashdp_compile.kernels.clip import release_weights_into

FAMILY = FAMILIES["clipped_product"]
CASE = (7, 33, 20, 24, 1, 1)
ALONE = (*CASE[:-1], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expected", [None, 7])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("case", [CASE, ALONE], ids=["group", "alone"])
def test_parts_give_the_same_as_the_whole(case, samples, mean, expected, dtype, device):
    x, g, _, beside, bound, fn, _, _, scale, key, stream, std = arguments(FAMILY, case, dtype, device)
    total, norms = FAMILY.launch(x, g, samples, beside, bound, fn, mean, expected, scale, key, stream, std)
    product, sqnorm = outer_store.launch(x, g)
    sqnorm = sqnorm if beside is None else sqnorm + beside
    weights = release_weights_into(None, sqnorm, None, bound, fn, mean, expected, scale)
    assert ((0 < weights) & (weights < 1)).any()
    (whole,) = product_sums.launch([product], [weights], key, [stream], std)
    assert torch.equal(norms, sqnorm)
    torch.testing.assert_close(
        total, whole, rtol=1e-6, atol=1e-7
    )  # a compiler may contract products and sums otherwise


@pytest.mark.parametrize("path", ["launch", "reference"])
def test_a_sample_that_is_not_finite_is_left_out(path, device):
    args = list(arguments(FAMILY, CASE, torch.float32, device))
    args[2] = 2
    for poison in (float("nan"), float("inf")):
        args[0][3, 5] = poison
        total, norms = getattr(FAMILY, path)(*args)
        assert total.isfinite().all()
        assert norms.isfinite().tolist() == [b != 3 for b in range(7)]
        args[1][3] = 0.0
        args[0][3, 5] = 0.0
        without, _ = getattr(FAMILY, path)(*args)
        torch.testing.assert_close(total, without)


@pytest.mark.parametrize("path", ["launch", "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
def test_a_sample_of_which_another_member_is_not_finite_is_left_out(path, poison, device):
    """As its weight is 0 in the sums of those members."""
    args = list(arguments(FAMILY, CASE, torch.float32, device))
    args[2] = 2
    args[3][3] = poison
    total, norms = getattr(FAMILY, path)(*args)
    weights = release_weights_into(None, norms, None, *args[4:9])
    assert total.isfinite().all()
    assert (weights != 0).tolist() == [b != 3 for b in range(7)]
    args[1][3], args[3][3] = 0.0, 0.0
    without, _ = getattr(FAMILY, path)(*args)
    torch.testing.assert_close(total, without)


@pytest.mark.parametrize("path", ["launch", "reference"])
def test_others_of_the_group_leave_less_of_the_bound(path, device):
    """The layer's part and theirs are together as long as the bound allows, for each sample."""
    x, g, _, beside, bound, *_ = arguments(FAMILY, CASE, torch.float32, device)
    own = outer_store.reference(x, g)[1]
    for b in range(7):
        one = x[b : b + 1], g[b : b + 1], 1, beside[b : b + 1], bound, "hard", False, None, None, None, 0, 0.0
        total, norms = getattr(FAMILY, path)(*one)
        clipped = bound / (own[b] + beside[b]).sqrt()
        assert clipped < 1
        torch.testing.assert_close(norms, own[b : b + 1] + beside[b : b + 1])
        torch.testing.assert_close(total, clipped * x[b].mT @ g[b], rtol=1e-4, atol=1e-5)


def test_norms_of_another_precision_take_the_twin(device):
    args = list(arguments(FAMILY, CASE, torch.float32, device))
    assert FAMILY.supports(*args)
    args[3] = args[3].double()
    assert not FAMILY.supports(*args)


def test_only_so_many_products_are_there_at_a_time(monkeypatch, device):
    seen = []
    store = outer_store.launch
    monkeypatch.setattr(outer_store, "launch", lambda x, g: seen.append(len(x)) or store(x, g))
    args = list(arguments(FAMILY, CASE, torch.float32, device))
    args[2] = 3
    FAMILY.launch(*args)
    assert seen == [3, 3, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU")
def test_the_peak_of_memory_is_that_of_one_part():
    x, g = (torch.randn(8, 64, n, device="cuda", dtype=torch.bfloat16) for n in (4096, 2048))
    args = x, g, 1, None, 1.0, "hard", True, 8, None, None, 0, 0.0
    FAMILY.launch(*args)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    FAMILY.launch(*args)
    product = 4096 * 2048 * 2
    assert torch.cuda.max_memory_allocated() - before < 1.3 * (product + 2 * product)  # and the sum, in float32
