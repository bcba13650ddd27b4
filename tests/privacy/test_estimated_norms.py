"""Clipping by estimated norms through the whole backend: what a release is made of, and what it reveals at most."""

import math

import pytest
import torch
from torch import nn

from flashdp_compile import OptionError, accounting
from flashdp_compile.runtime import probe_keys
from privacy.steps import compiled, flat, gradients

WIDTH, PROBES = 96, 16
ESTIMATED = {"norm": "hutchinson", "probes": PROBES, "loss_reduction": "sum"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))


def step(private: nn.Module, x: torch.Tensor) -> torch.Tensor:
    private(x).square().sum().backward()
    return flat(gradients(private._orig_mod))


def samples(count: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(count, tokens, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["hutchinson", "hutch++"])
def test_the_sum_is_that_of_single_samples(norm):
    """With a seed and after a reset, every backward has the same probes."""
    private, x = compiled(model(), **{**ESTIMATED, "norm": norm}, max_grad_norm=0.1, seed=3), samples(4)
    parts = []
    for rows in (x, x[:2], x[2:], x[:1].expand(2, -1, -1)):
        probe_keys.KEYS.reset()
        parts.append(step(private, rows))
    torch.testing.assert_close(parts[1] + parts[2], parts[0], rtol=1e-4, atol=1e-7)
    assert 0.05 < float(parts[3].norm()) / 2 < 0.2


def test_every_backward_has_its_own_probes():
    private, x = compiled(model(), **ESTIMATED, max_grad_norm=0.1), samples(2)
    lengths = [float(step(private, x).norm()) for _ in range(6)]
    assert len({round(length, 7) for length in lengths}) == 6


@pytest.mark.parametrize("norm", ["hutchinson", "hutch++"])
def test_samples_without_a_gradient_or_without_a_number(norm):
    private = compiled(model(), **{**ESTIMATED, "norm": norm}, max_grad_norm=0.1, seed=3)
    x = samples(3)
    x[0], x[1, 2, 3] = 0, math.nan
    probe_keys.KEYS.reset()
    together = step(private, x)
    assert together.isfinite().all() and together.norm() > 0.05


def test_what_has_no_accountant_is_refused():
    for probes in (64.0, 0, 24, 512, lambda data: 64, "rademacher"):
        with pytest.raises(OptionError, match="probes=.*allowed: one of 16, 32, 64, 128, 256"):
            compiled(model(), norm="hutchinson", probes=probes)(samples(2))
    with pytest.raises(OptionError, match="norm=.rademacher.*allowed"):
        compiled(model(), norm="rademacher")(samples(2))


def losses_of_canaries(sigma: float, runs: int, monkeypatch) -> torch.Tensor:
    """The privacy loss, log p(release with the canary) / p(release without), of canaries in runs of the real backend.

    A canary has one token, so a gradient of rank one, the worst case of the theory. Many of them take part in every
    run, each moving a coordinate of its own. The adversary knows the probes, and so what each has added: it is read
    off a second backward, without noise, that has the same ones.
    """
    layer, size = nn.Linear(WIDTH, WIDTH, bias=False), 1e4
    silent, noisy = (compiled(layer, **ESTIMATED, max_grad_norm=1.0, noise_multiplier=s) for s in (0.0, sigma))
    places = torch.eye(WIDTH)

    def released(private: nn.Module) -> torch.Tensor:
        layer.zero_grad()
        (size * private(places[:, None, :])[:, 0] * places).sum().backward()
        return layer.weight.grad.diagonal().double()

    losses = []
    for run in range(runs):
        key = torch.tensor([run, 5])
        monkeypatch.setattr(probe_keys.KEYS, "draw", lambda *a, key=key: key)
        added, seen = released(silent), released(noisy)
        losses.append((seen * added - added.square() / 2) / sigma**2)
    return torch.cat(losses)


def spent(sigma: float, delta: float, **norm) -> float:
    """The epsilon that the accountant gives a step which takes every sample."""
    return accounting.epsilon(noise_multiplier=sigma, steps=1, sample_rate=1.0, delta=delta, **norm)


def test_canaries_of_rank_one_meet_the_bound_and_exceed_that_of_exact_norms(monkeypatch):
    """delta(epsilon) = E (1 - e^(epsilon - loss))+ : not above what is accounted for, near it, and far above what the
    same noise promises for exact norms."""
    sigma, epsilon = 0.5, 8.0
    excess = (1 - torch.exp(epsilon - losses_of_canaries(sigma, 60, monkeypatch))).clamp(min=0)
    delta, error = float(excess.mean()), float(excess.std()) / math.sqrt(len(excess))
    least, most = delta - 4 * error, 1.5 * (delta + 4 * error)  # epsilon falls where delta grows
    estimated = {"norm": "hutchinson", "probes": PROBES}
    assert spent(sigma, least, **estimated) > epsilon > spent(sigma, most, **estimated)
    assert spent(sigma, least) < epsilon
