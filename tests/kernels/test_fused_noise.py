"""Noise that a sum adds by itself is what add_noise would have added to it."""

import pytest
import torch
from kernel_cases import arguments

from flashdp_compile.kernels import FAMILIES, gaussian, tuning

KEY = torch.tensor([-0x123456789ABCDEF0, 0x1F2345678])
CASES = {
    "product_sum": [(3, 5, 7), (5, 63, 65), (4, 130, 8), (0, 3, 4)],  # B, d, p
    # B, T, d, p: rows of whole Philox blocks and not, one run of samples and several
    "embedding_sum": [(3, 5, 8, 3), (2, 65, 7, 9), (2, 3, 132, 1)],  # B, T, d, ids
    "weighted_matmul": [(4, 5, 130, 72), (3, 9, 8, 4), (2, 5, 6, 7), (300, 1, 3, 8), (0, 4, 3, 4)],
}
POINTS = [pytest.param(name, case, id=f"{name}-{case}") for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("path", ["launch", "reference"])
@pytest.mark.parametrize("name, case", POINTS)
def test_the_same_bits_as_noise_apart(name, case, path, device):
    family, key = FAMILIES[name], KEY.to(device)
    args = arguments(family, case, device=device)
    run = getattr(family, path)
    apart = getattr(gaussian, path)(run(*args), key, 9, 0.7)
    # embedding_sum adds to the noise, where add_noise may fuse its product into the addition; weighted_matmul scales a
    # sum and adds, which may be fused as well
    if name in ("embedding_sum", "weighted_matmul"):
        torch.testing.assert_close(run(*args, key, 9, 0.7), apart, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(run(*args, key, 9, 0.7), apart)
    assert not torch.equal(apart, run(*args))


@pytest.mark.parametrize("processors", [1, 4, 64])
def test_runs_of_samples_change_rounding_only(processors, device, monkeypatch):
    monkeypatch.setattr(tuning, "processors", lambda device: processors)
    family, key = FAMILIES["weighted_matmul"], KEY.to(device)
    args = arguments(family, (7, 6, 70, 68), device=device)
    torch.testing.assert_close(family.launch(*args, key, 3, 0.5), family.reference(*args, key, 3, 0.5))


@pytest.mark.parametrize("name", CASES)
def test_a_stream_is_a_word(name, device):
    family = FAMILIES[name]
    args = arguments(family, CASES[name][0], device=device)
    with pytest.raises(ValueError, match="unsigned word of 32 bits"):
        family.launch(*args, KEY.to(device), -1, 0.5)


@pytest.mark.parametrize("path", ["launch", "reference"])
@pytest.mark.parametrize("case", FAMILIES["vector_sums"].cases)
def test_vectors_get_the_noise_of_their_own_streams(case, path, device):
    values, weights, key, streams, std = arguments(FAMILIES["vector_sums"], case, device=device)
    silent = [torch.zeros_like(v) for v in values]
    noises = getattr(FAMILIES["vector_sums"], path)(silent, weights, key, streams, std)
    for noise, stream in zip(noises, streams, strict=True):
        apart = getattr(gaussian, path)(torch.zeros_like(noise), key, stream, std)
        assert torch.equal(noise, apart)
