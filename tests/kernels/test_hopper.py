"""Warp-specialised kernels against their twins, on the one device that has them; bounds as in test_families.py."""

import pytest
import torch
import triton
from kernel_cases import arguments, outputs
from test_families import check
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flashdp_compile.compat import early
from flashdp_compile.kernels import FAMILIES, hopper

pytestmark = pytest.mark.gpu

CASES = {
    # B, T, count, d_0, p_00, ..., d_1, p_10, ...
    "gram_sqnorms": (
        (4, 70, 2, 256, 512),
        (3, 256, 2, 768, 2304, 768, 768, 128, 1000),
        (5, 197, 3, 256, 64, 512, 128, 192, 256, 256, 64, 512),
        (2, 500, 4, 128, 136, 8, 64),
        (300, 33, 2, 64, 64),
    ),
    # B, T, d_0, p_0, d_1, p_1, ...
    "weighted_matmuls": (
        (4, 70, 256, 512),
        (64, 32, 1024, 3072, 768, 768, 768, 3072),
        (16, 197, 768, 2304, 768, 768, 768, 3072, 3072, 768),
        (2, 500, 1000, 1000, 3072, 4096),
        (1, 64, 4096, 4096, 4096, 4096),
        (33, 129, 128, 520),
    ),
}
CASES["outer_stores"] = CASES["weighted_matmuls"]
POINTS = [pytest.param(name, case, id=f"{name}-{'x'.join(map(str, case))}") for name in CASES for case in CASES[name]]


@pytest.fixture(autouse=True)
def needed():
    if not hopper.available(torch.device("cuda", 0)):
        pytest.skip("needs compute capability 9.0 and the Gluon of Triton 3.6")


@pytest.mark.parametrize("name, case", POINTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_like_the_twin(name, case, dtype, device):
    args = arguments(FAMILIES[name], case, dtype, device)
    assert FAMILIES[name].stays_op(*args), "these operands take the Triton template"
    check(name, FAMILIES[name].launch(*args), args)


@pytest.mark.parametrize("name, case", POINTS)
def test_same_bits_on_every_run(name, case, device):
    args = arguments(FAMILIES[name], case, torch.bfloat16, device)
    first = outputs(FAMILIES[name].launch(*args))
    for _ in range(20):
        again = outputs(FAMILIES[name].run(*args))  # which prepares once, and then only launches
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name, case", POINTS[:2] + POINTS[-2:])
def test_what_is_compiled_early_is_what_is_launched(name, case, device, monkeypatch):
    args, again = arguments(FAMILIES[name], case, torch.bfloat16, device), []
    with FakeTensorMode() as mode:
        FAMILIES[name].compile_early(*tree_map_only(torch.Tensor, mode.from_tensor, args))
    begun = [future.result() for futures in early._UNDER_WAY.values() for future in futures.values()]
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **what: again.append(what))
    FAMILIES[name].run(*args)
    assert begun and not again


@pytest.mark.parametrize("kept", [(), (0,), (7,), (0, 7)], ids=str)
def test_a_sample_of_weight_zero_is_not_read(kept, device):
    """Tiles of few steps or none at all: a descriptor must not change under loads of the tile before."""
    xs, gs, _, _, _, _ = arguments(FAMILIES["weighted_matmuls"], (8, 40, *6 * (1024, 2048)), torch.bfloat16, device)
    weights = torch.zeros(8, device=device)
    weights[list(kept)] = 0.5
    for t in (*xs, *gs):
        t[weights == 0] = torch.nan
    got = FAMILIES["weighted_matmuls"].launch(xs, gs, [weights] * 6, None, [], 0.0)
    want = FAMILIES["weighted_matmuls"].reference(xs, gs, [weights] * 6, None, [], 0.0)
    for value, truth in zip(got, want, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-4)


def test_a_sample_alone_has_the_bits_that_it_has_among_others(device):
    family = FAMILIES["gram_sqnorms"]
    xs, gs, bias = arguments(family, CASES["gram_sqnorms"][1], torch.bfloat16, device)
    alone = family.launch([x[1:2] for x in xs], [g[1:2] for g in gs], bias)
    assert torch.equal(alone, family.launch(xs, gs, bias)[:, 1:2])


def test_a_nan_stays_in_its_sample(device):
    xs, gs, bias = arguments(FAMILIES["gram_sqnorms"], (3, 256, 2, 768, 2304), torch.bfloat16, device)
    norms = FAMILIES["gram_sqnorms"].launch(xs, gs, bias)
    gs[0][1, 17, 3] = torch.nan
    after = FAMILIES["gram_sqnorms"].launch(xs, gs, bias)
    assert torch.equal(after[:, [0, 2]], norms[:, [0, 2]]) and after[0, 1].isnan()
