"""Estimated norms: exact where probes are the identity, chi-square for one token, and never below by rounding alone."""

import math

import pytest
import torch
from kernel_cases import arguments, double
from scipy import stats

from flashdp_compile.kernels import FAMILIES, probes
from flashdp_compile.kernels.gaussian import gaussian
from flashdp_compile.kernels.guard import SLACK
from flashdp_compile.kernels.halves import SPLIT
from flashdp_compile.kernels.sketches import draw

ops = torch.ops.flashdp


def key(number: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([number, 5], device=device)


def randn(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture
def identity(monkeypatch):
    """Probes that leave everything as it is: as many as there are rows. Streams have blocks of rows of their own, as
    layers that share an input are laid side by side."""
    widths: list[int] = []

    def matrix(key, stream, rows, count, dtype):
        at = sum(widths[:stream])
        return torch.eye(count, dtype=dtype)[at : at + rows]

    for module in ("sketch_sqnorm", "tied_sketch_sqnorm", "hutchpp_sqnorm"):
        monkeypatch.setattr(f"flashdp_compile.kernels.{module}.probe_matrix", matrix)
    return widths


def test_identity_probes_give_the_norm_of_a_layer_and_of_several(identity):
    identity += [7, 4]
    x, g, other = randn(3, 5, 6), randn(3, 5, 7, seed=1), randn(3, 5, 4, seed=2)
    norms = [(x.mT @ t).square().sum((1, 2)) for t in (g, other)]
    torch.testing.assert_close(ops.sketch_sqnorm(x, [g], key(), [0], 7), norms[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ops.sketch_sqnorm(x, [g, other], key(), [0, 1], 11), sum(norms), rtol=1e-5, atol=0)


def test_identity_probes_give_the_norm_of_a_tied_table(identity):
    ids, ge, x, gl = double(arguments(FAMILIES["tied_sketch_sqnorm"], (3, 5, 6, 7, 9)))[:4]
    table = gl.mT @ x
    for b in range(3):
        for t in range(5):
            if ids[b, t] >= 0:
                table[b, ids[b, t]] += ge[b, t]
    found = ops.tied_sketch_sqnorm(ids, ge, x, gl, key(), 0, 9)
    torch.testing.assert_close(found, table.square().sum((1, 2)), rtol=1e-5, atol=0)


def test_hutchpp_is_exact_for_a_small_rank():
    x, g = randn(3, 5, 40), randn(3, 5, 30, seed=1)
    exact = (x.mT @ g).square().sum((1, 2))
    torch.testing.assert_close(ops.hutchpp_sqnorm(x, g, key(), [0, 1], 16), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("projected", ["wide", "narrow"])
def test_one_token_follows_chi_square(projected):
    """A gradient of rank one is the worst case of the accountant."""
    x, g = randn(1, 1, 1), randn(1, 1, 50, seed=1)
    ratios = []
    for number in range(200):
        pair = (x, [g]) if projected == "wide" else (g, [x])
        estimate = ops.sketch_sqnorm(*pair, key(number), [3], 16)
        ratios.append((estimate / (x.mT @ g).square().sum((1, 2)))[0])
    assert stats.kstest(16 * torch.stack(ratios).numpy(), stats.chi2(16).cdf).pvalue > 1e-3


def test_an_estimate_does_not_depend_on_the_batch():
    x, g = randn(4, 6, 20), randn(4, 6, 30, seed=1)
    alone = torch.cat([ops.sketch_sqnorm(x[b : b + 1], [g[b : b + 1]], key(), [0], 16) for b in range(4)])
    torch.testing.assert_close(ops.sketch_sqnorm(x, [g], key(), [0], 16), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sketch_sqnorm", "hutchpp_sqnorm"])
def test_mean_and_variance_are_as_predicted(name):
    """E = |M|^2, Var = 2 / k sum lambda^2 |M|^4 of Hutchinson; Hutch++ varies less."""
    x, g, probe_count, draws = randn(1, 40, 30), randn(1, 40, 50, seed=1), 16, 400
    spectrum = torch.linalg.svdvals(x[0].mT @ g[0]).square()
    exact = spectrum.sum()
    streams = [0] if name == "sketch_sqnorm" else [0, 1]
    operands = (x, [g]) if name == "sketch_sqnorm" else (x, g)
    found = torch.stack([getattr(ops, name)(*operands, key(n), streams, probe_count)[0] for n in range(draws)])
    variance = float(2 / probe_count * spectrum.square().sum())
    assert abs(found.mean() - exact) < 4 * math.sqrt(variance / draws)
    ratio = float(found.var()) / variance
    if name == "sketch_sqnorm":
        assert 0.75 < ratio < 1.3
    else:
        assert ratio < 0.3


def test_probes_are_the_noise_of_their_key_and_stream():
    expected = gaussian((50, 16), key(4), 9) / 4
    assert torch.equal(probes.probe_matrix(key(4), 9, 50, 16, torch.float32), expected)
    rows = probes.probe_matrix(key(4), 9, 80, 16, torch.float32)
    assert torch.equal(rows[:50], expected), "a row does not depend on how many there are"


def test_drawn_probes_are_those_of_the_twin(device):
    drawn = draw(key(4, device), 9, 50, 32)[0].float()
    expected = probes.probe_matrix(key(4, device), 9, 50, 32, torch.float32)
    torch.testing.assert_close(drawn[:, :32] + drawn[:, 32:], expected, rtol=2.0**-17, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [64, 1500])
def test_an_estimate_is_not_below_what_cancels(dtype, tokens, device):
    """Tokens that cancel but for a small part: rounding is relative to what cancels, and the guard has to cover it."""
    x = randn(1, 1, 40, device=device).to(dtype).expand(2, tokens, 40).contiguous()
    g = randn(2, tokens, 24, seed=1, device=device).to(dtype)
    g[:, 1::2] = -g[:, 0::2]
    g[:, 0] += (2.0**-8 * randn(2, 24, seed=2, device=device)).to(dtype)
    args = (x, [g], key(7, device), [0], 16)
    exact = FAMILIES["sketch_sqnorm"].reference(*double(args[:2]), *args[2:])
    found = FAMILIES["sketch_sqnorm"].launch(*args).double()
    assert (found.sqrt() * (1 + SLACK) >= exact.sqrt() * (1 - 1e-6)).all()
    h = g.double().cpu() @ probes.probe_matrix(key(7), 0, 24, 16, torch.float64)
    length = x.double().cpu().norm(dim=(1, 2)) * h.norm(dim=(1, 2))
    assert (found.cpu().sqrt() * (1 + SLACK) >= 2 * SPLIT * length).all(), "what rounding may have hidden"
    assert (found <= 40 * exact + 1e-3 * (x.double().square().sum() * g.double().square().sum())).all()


def test_a_sample_that_is_not_finite_stays_alone(device):
    for name in ("sketch_sqnorm", "hutchpp_sqnorm", "tied_sketch_sqnorm"):
        family = FAMILIES[name]
        case = (3, 5, 6, 17, 19) if name == "tied_sketch_sqnorm" else (3, 5, 17, 19)
        args = arguments(family, case, torch.float32, device)
        before = family.launch(*args)
        x = args[0] if name != "tied_sketch_sqnorm" else args[2]
        x[1, 2, 3] = math.inf
        after = family.launch(*args)
        assert not after[1].isfinite() and torch.equal(before[[0, 2]], after[[0, 2]])
        assert not family.reference(*args)[1].isfinite()
