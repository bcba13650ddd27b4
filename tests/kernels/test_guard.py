"""Adversarial samples whose tokens' gradients cancel: the reported norm must never be below the true one."""

import pytest
import torch

from flashdp_compile.kernels import FAMILIES, SLACK, embedding_sqnorm, gram_sqnorms
from flashdp_compile.kernels.guard import guarded, guarding

both = pytest.mark.parametrize("path", ["launch", "reference"])


def cancelling(samples, distinct, repeats, dtype, device, d=4, p=5):
    """x, g whose per-sample gradient x^T g is about rounding error: g is projected off the columns of x.

    Token t occurs `repeats` times, so that its roundings are the same every time and do not average out.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, distinct, d, generator=generator).to(dtype).double()
    g = torch.randn(samples, distinct, p, generator=generator).double()
    g = g - x @ torch.linalg.lstsq(x, g).solution
    g = g + x * torch.logspace(-9, -3, samples, dtype=torch.float64)[:, None, None] if p == d else g
    return tuple(t.to(dtype).repeat(1, repeats, 1).to(device) for t in (x, g))


def true_norm(x, g):
    return (x.double().mT @ g.double()).square().sum((1, 2)).sqrt()


def unguarded(module, monkeypatch):
    """The estimates themselves."""
    for name in ("guarded", "guarded_root"):
        monkeypatch.setattr(module, name, lambda est, bound: est, raising=False)
    monkeypatch.setattr(module, "guarding", lambda rows, error: lambda part, root: part.sum(-1), raising=False)


@both
@pytest.mark.parametrize("repeats", [1, 8])
@pytest.mark.parametrize("p", [4, 5])
def test_gram_is_never_below_the_true_norm(path, repeats, p, device, monkeypatch):
    x, g = cancelling(48, 16, repeats, torch.float32, device, p=p)
    run = getattr(FAMILIES["gram_sqnorm"], path)
    truth = true_norm(x, g)
    out = run(x, [g], [False])
    assert (out.double().sqrt() * (1 + SLACK) >= truth).all()
    unguarded(gram_sqnorms, monkeypatch)
    naive = run(x, [g], [False]).double().clamp_min(0).sqrt()
    assert (naive * (1 + SLACK) < truth).any(), "this example no longer needs the guard"


@both
def test_gram_of_narrow_operands_that_cancel(path, device):
    x, g = cancelling(32, 70, 1, torch.bfloat16, device)
    out = getattr(FAMILIES["gram_sqnorm"], path)(x, [g], [False])
    assert (out.double().sqrt() * (1 + SLACK) >= true_norm(x, g)).all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_truncating_tensor_cores(path, dtype, device):
    """x_2 . x_2 and x_1 . x_2 are exact in float32, x_1 . x_1 loses bits at every step."""
    x = torch.ones(1, 2, 16384)
    x[:, 0] += 2.0**-7
    x, g = x.to(device, dtype), torch.tensor([[[1.0], [-1.0]]], device=device, dtype=dtype)
    out = getattr(FAMILIES["gram_sqnorm"], path)(x, [g], [False])
    assert (out.double().sqrt() * (1 + SLACK) >= true_norm(x, g)).all()


@both
def test_underflow_of_one_gram_matrix_does_not_hide_a_sample(path, device):
    x, g = torch.full((1, 5, 8), 1e-24, device=device), torch.full((1, 5, 4), 1e18, device=device)
    for a, b in ((x, g), (g, x)):
        out = getattr(FAMILIES["gram_sqnorm"], path)(a, [b], [False])
        assert (out.double().sqrt() * (1 + SLACK) >= true_norm(a, b)).all()


@both
def test_embedding_rows_that_cancel(path, device):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(32, 32, 9, generator=generator)
    g[:, 16:] = -g[:, :16] * (1 + 1e-4 * torch.rand(32, 16, 1, generator=generator))
    ids = torch.zeros(32, 32, dtype=torch.int64)
    truth = g.double().sum(1).square().sum(1).sqrt()
    out = getattr(FAMILIES["embedding_sqnorm"], path)(ids.to(device), g.to(device))
    assert (out.cpu().double().sqrt() * (1 + SLACK) >= truth).all()


@pytest.mark.parametrize("module", [gram_sqnorms, embedding_sqnorm])
def test_ordinary_samples_get_the_estimate_itself(module, device, monkeypatch):
    args = module.FAMILY.example(module.FAMILY.cases[1], torch.float32, device, torch.Generator().manual_seed(0))
    out = module.launch(*args)
    unguarded(module, monkeypatch)
    torch.testing.assert_close(out, module.launch(*args), rtol=1e-6, atol=0)  # below what a guard would add


def test_nan_and_negative_estimates_are_not_repaired():
    out = guarded(torch.tensor([float("nan"), -1.0, 2.0]), torch.tensor([1.0, 0.5, 0.0]))
    assert out[0].isnan() and out[1] < 0 and out[2] == 2.0


@pytest.mark.parametrize("rows, n, m", [(2, 3, 2), (5, 1, 1), (3, 1056, 64), (1, 128, 129)])
def test_one_kernel_sums_the_parts_and_guards(rows, n, m, device):
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(2, rows, n, generator=generator).to(device)
    root = torch.rand(2, rows, m, generator=generator).to(device)
    part[0, 0, 0], root[1, 0, 0] = float("nan"), float("nan")
    for error in (0.0, 1e-3, 10.0):
        expected = guarded(part.double().sum(-1), error * root.double().sum(-1).square())
        found = guarding(2 * rows, error)(part, root)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert found[0, 0].isnan() and (error == 0 or found[1, 0].isnan())


@both
def test_the_product_that_is_summed_is_the_product_that_was_measured(path, device):
    """Where tokens cancel the product is mostly rounding: a sum that rounds otherwise would exceed the bound."""
    x, g = cancelling(8, 70, 1, torch.float32, device)
    measured = getattr(FAMILIES["outer_sqnorm"], path)(x, g)
    for b in range(8):
        weights = torch.zeros(8, device=device)
        weights[b] = 1
        added = getattr(FAMILIES["weighted_matmul"], path)(x, g, weights)
        torch.testing.assert_close(added.double().square().sum(), measured[b].double(), rtol=1e-6, atol=0)
