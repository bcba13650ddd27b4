"""Weights of several groups in one launch: those that each would get by itself, whatever its norm is made of."""

import math

import pytest
import torch
from kernel_cases import arguments

from flashdp_compile.kernels import FAMILIES, clip

FAMILY = FAMILIES["group_weights"]
both = pytest.mark.parametrize("path", ["launch", "reference"])
BAD = [1.0, math.nan, math.inf, -1e-6, 0.0, 1e-44, 3e38, 4.0]


@both
@pytest.mark.parametrize("fn", clip.FUNCTIONS)
@pytest.mark.parametrize("mean, expected", [(True, 5), (True, None), (False, None)])
def test_weights_are_those_of_each_group_alone(path, fn, mean, expected, device):
    generator = torch.Generator().manual_seed(0)
    norms = [torch.tensor(BAD, device=device), *(torch.rand(8, generator=generator).to(device) * 9 for _ in range(3))]
    rule, bounds = (fn, mean, expected), [0.25, 3e-5, 1e3, 7.0]
    weights, sqnorms = getattr(FAMILY, path)([], norms, [0] * 4, [1] * 4, bounds, *rule)
    assert torch.equal(sqnorms.nan_to_num(1e-3), torch.stack(norms).nan_to_num(1e-3)), "as they came"
    for k, bound in enumerate(bounds):
        alone = clip.release_weights(norms[k], bound, *rule)
        torch.testing.assert_close(weights[k], alone, rtol=2.0**-22, atol=0)
        assert weights.dtype == torch.float32 and torch.equal(weights[k] == 0, alone == 0)


@both
@pytest.mark.parametrize("fn", clip.FUNCTIONS)
def test_no_sample_exceeds_the_bound_of_its_group(path, fn, device):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(500, n, generator=generator).to(device) for n in (3, 40, 5)]
    values = [v * torch.randn(500, 1, generator=generator).mul(4).exp().to(device) for v in values]
    bounds = [1.0, 0.1]
    weights, _ = getattr(FAMILY, path)(values, [], [2, 1], [0, 0], bounds, fn, False, None)
    for k, own in enumerate((values[:2], values[2:])):
        norm = sum(v.double().square().sum(1) for v in own).sqrt()
        assert (weights[k].double() * norm <= bounds[k]).all()


@both
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_sample_spoils_its_own_group_only(path, poison, device):
    args = arguments(FAMILY, FAMILY.cases[1], device=device)
    values, norms, vectors, *_ = args
    clean = getattr(FAMILY, path)(*args)
    values[vectors[0]][7, -1] = norms[0][9] = poison  # both belong to the second group
    weights, sqnorms = getattr(FAMILY, path)(*args)
    assert (weights[1, [7, 9]] == 0).all() and not sqnorms[1, [7, 9]].isfinite().any()
    for now, was in zip((weights, sqnorms), clean, strict=True):
        now[1, [7, 9]] = was[1, [7, 9]]
        assert torch.equal(now, was)


@pytest.mark.parametrize("samples", [1, 6])
def test_a_sample_alone_gives_the_same_bits(samples, device):
    values, norms, *rest = arguments(FAMILY, FAMILY.cases[1], device=device)
    rest[-2:] = False, None  # what is divided by must not depend on the batch
    together = FAMILY.launch(values, norms, *rest)
    alone = FAMILY.launch([v[:samples] for v in values], [n[:samples] for n in norms], *rest)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[:, :samples], b)


def test_bounds_without_a_limit_and_bad_ones(device):
    norms = [torch.tensor([4.0, math.inf], device=device)]
    assert FAMILY.launch([], norms, [0], [1], [math.inf], "hard", False, None)[0].tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="must be positive"):
        FAMILY.launch([], norms, [0], [1], [0.0], "hard", False, None)
