"""Steps as people run them on a GPU: Inductor, bfloat16 autocast, fused AdamW; gradients against a loop over samples.

The models are small, and of the sizes at which kernels change their ways: a vocabulary whose rows descriptors cannot
read, products of several tiles, one layer much larger than the others, layers with few tokens for their width.
"""

import pytest
import torch
from torch import nn

from benchmarks.measure import prepare
from benchmarks.settings import Settings
from benchmarks.steps import run_steps
from benchmarks.workloads import WORKLOADS, Workload

pytestmark = pytest.mark.gpu

WIDE, NARROW = {"layers": 2, "heads": 2, "width": 512}, {"layers": 2, "heads": 2, "width": 128}
SHAPES = {
    "odd vocabulary": ("gpt", 4, 128, {**NARROW, "vocabulary": 2051}),
    "one sample more than a block": ("gpt", 9, 72, {**NARROW, "vocabulary": 512}),
    "few tokens": ("gpt", 8, 16, {**WIDE, "vocabulary": 1031}),
    "gated": ("llama", 4, 136, {**NARROW, "mlp": 344, "vocabulary": 1500}),
    "images": ("vit", 4, 17, {**NARROW, "image": 32, "patch": 8, "classes": 10}),
}


def workload(name: str) -> Workload:
    family, batch, length, size = SHAPES[name]
    return Workload(name=name, family=family, batch=batch, length=length, size=size)


@pytest.mark.parametrize("clipping", ["per_layer", "flat"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_a_loop_over_samples(name, clipping, monkeypatch):
    monkeypatch.setitem(WORKLOADS, name, workload(name))
    found = prepare(name, f"flashdp-{clipping}", Settings(device="cuda", dtype="bf16"))  # raises CheckFailed
    run_steps(found.step, found.batches, 3)
    assert found.step.complaint() is None


def gradients(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], compiled: nn.Module) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        losses = compiled(*batch)
    losses.mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


@pytest.mark.parametrize("clipping", ["per_layer", "flat"])
def test_cuda_graphs_release_what_launches_one_by_one_release(clipping):
    """With fresh noise at every replay."""
    its = workload("odd vocabulary")
    model, batches = its.model(device="cuda"), its.batches(3, "cuda")
    options = {"clipping": clipping, "noise_multiplier": 0.0, "expected_batch_size": 4}
    one_by_one = torch.compile(model, backend="flashdp", options=options)
    expected = [gradients(model, batch, one_by_one) for batch in batches]
    assert (expected[0] - expected[1]).norm() > 0.1 * expected[0].norm(), "a replay of another batch would be seen"
    torch._dynamo.reset()
    replayed = torch.compile(model, backend="flashdp", options={**options, "mode": "reduce-overhead"})
    for _ in range(3):  # recorded by the second step
        for batch, gradient in zip(batches, expected, strict=True):
            # two compilations, and attention's own backward, round differently in 16 bits
            error = gradients(model, batch, replayed) - gradient
            assert error.norm() < 5e-3 * gradient.norm()
    torch._dynamo.reset()
    noisy = {**options, "mode": "reduce-overhead", "noise_multiplier": 1.0}
    replayed = torch.compile(model, backend="flashdp", options=noisy)
    seen = [gradients(model, batches[0], replayed) - expected[0] for _ in range(6)]
    for one, other in zip(seen, seen[1:], strict=False):
        assert one.std().item() == pytest.approx(1 / 4, rel=0.02)
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 0.02


class Overwritten(nn.Module):
    """The gradient of `h` is one tensor with zeros written into it for one layer, and without them for the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.a, self.b = nn.Linear(16, width, bias=False), nn.Linear(16, width, bias=False)
        self.register_buffer("places", torch.tensor([0, 2, 3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        other = self.b(x)
        h = self.a(x).clone()
        h[:, self.places] = 0
        return (h + other).float().pow(3).sum((1, 2))


@pytest.mark.parametrize("strategy", ["auto", "gram", "outer"])
@pytest.mark.parametrize("width", [64, 1101])
def test_an_operand_is_read_before_it_is_overwritten(width, strategy):
    """Inductor writes the zeros in place where it believes that nothing reads the memory later."""
    torch.manual_seed(0)
    model = Overwritten(width).cuda()
    x = torch.randn(4, 8, 16, device="cuda")
    model(x).mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1e12, "norm_strategy": strategy}
    compiled = torch.compile(model.bfloat16(), backend="flashdp", fullgraph=True, options=options)
    compiled(x.bfloat16()).mean().backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert (p.grad.float() - gradient).norm() < 2e-2 * gradient.norm()
