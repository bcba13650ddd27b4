"""The engine and its noise on a GPU: a compiled run in bfloat16, and a hundred million draws."""

import math

import pytest
import torch
from scipy.special import ndtr
from torch import nn

from engine.runs import BATCH, engine
from flashdp_compile import Quantile
from flashdp_compile.engine.noise import NOISES, SecureNoise
from flashdp_compile.kernels.secure_noise import grid
from flashdp_compile.runtime import secure_key

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_compiled_run(parts, noise):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 1)).cuda()
    its = engine(noise_multiplier=1.0, micro_batches=parts, noise=noise, options={})
    compiled, optimizer = its.compile(model), its.attach(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
    seen = []
    for _ in range(2):
        for part in torch.zeros(8, 64, device="cuda").chunk(parts):  # whose gradients are those of the last bias alone
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(part).square().mean()
            loss.backward()
            optimizer.step()
        seen.append(model[0].weight.grad.clone())
    assert its.steps_done == 2
    for draw in seen:
        assert draw.std().item() == pytest.approx(0.5 / 8, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([d.flatten() for d in seen]))[0, 1]) < 0.03


def test_what_a_device_draws_is_tried_out():
    assert SecureNoise(None).add([torch.zeros(8, device="cuda")], 1, [0], 1.0)[0].abs().max() > 0.1


def test_a_hundred_million_draws():
    """Against the normal distribution at the edges of the grid's cells, where both are exact; and far out."""
    std, each, runs = 1.0, 1 << 24, 6
    g, key = grid(std), secure_key.fresh("cuda")
    reach = math.ceil(12 / g)
    counts = torch.zeros(2 * reach + 1, dtype=torch.int64, device="cuda")
    for stream in range(runs):
        drawn = torch.ops.flashdp.add_secure_noise(torch.zeros(each, device="cuda"), key, stream, std)
        counts += torch.bincount((drawn / g).round().long() + reach, minlength=2 * reach + 1)
    total = counts.sum().item()
    assert total == each * runs > 10**8
    edges = (torch.arange(-reach, reach + 1, dtype=torch.float64) + 0.5) * g
    expected = torch.from_numpy(ndtr(edges.numpy() / std))
    found = counts.cpu().cumsum(0).double() / total
    assert (found - expected).abs().max() * math.sqrt(total) < 2.0  # exceeded by chance once in 1500
    for deviations in (3, 4, 5):
        inside = expected[(edges > deviations).nonzero()[0]].item()
        mean = 2 * (1 - inside) * total
        beyond = (
            total
            - (found[(edges > deviations).nonzero()[0]] - found[(edges < -deviations).nonzero()[-1]]).item() * total
        )
        assert abs(beyond - mean) < 5 * math.sqrt(mean), (deviations, beyond, mean)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("bounds", [None, Quantile(target=0.3, rate=0.5)], ids=["still", "quantile"])
def test_sums_of_micro_batches_in_compiled_code(bounds, clipping, mode):
    """Against the interpreted run on the CPU: gradients and bounds of four steps of two micro-batches."""
    runs = []
    for device, options in (("cpu", {"compiler": "eager"}), ("cuda", {"mode": mode})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
        its = engine(micro_batches=2, bounds=bounds, clipping=clipping, options=options)
        compiled, optimizer = its.compile(model), its.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        seen = []
        for step in range(4):
            x = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step)).to(device)
            for part in x.chunk(2):
                optimizer.zero_grad()
                compiled(part).square().sum(1).mean().backward()
                optimizer.step()
            seen.append([p.grad.detach().cpu().clone() for p in model.parameters()])
        runs.append((seen, its.max_grad_norm()))
    (expected, expected_bounds), (found, found_bounds) = runs
    assert found_bounds == pytest.approx(expected_bounds, rel=1e-4)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_parameters_whose_gradients_are_one_tensor(noise):
    """Noise is added in place, and to each its own."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Parameter(torch.zeros(4096, 64)), nn.Parameter(torch.zeros(4096, 64))

        def forward(self, x):
            return x @ (self.one + self.other)

    model = Both().cuda()
    its = engine(noise_multiplier=1.0, noise=noise, options={})
    compiled, optimizer = its.compile(model), its.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    compiled(torch.zeros(BATCH, 4096, device="cuda")).square().sum(1).mean().backward()
    optimizer.step()
    drawn = torch.stack([p.grad.flatten() for p in model.parameters()])
    assert drawn.std(1).tolist() == pytest.approx([0.5 / 8] * 2, rel=0.01)
    assert abs(torch.corrcoef(drawn)[0, 1]) < 0.01
