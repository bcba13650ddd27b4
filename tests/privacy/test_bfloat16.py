"""Under autocast and with bfloat16 parameters: within 2e-2 of float64, and the bound holds for what is added up."""

import pytest
import torch
from torch import nn

from privacy.steps import QUIET, compiled, flat, gradients, recorded_graphs
from reference import bf16_rounded, bound_between, per_sample_gradients, relative_errors, release
from zoo import CASES, Case
from zoo.case import as_float, map_tensors
from zoo.training import loss_of

NAMES = ("mlp", "linear_3d", "embedding_then_linear", "rms_norm", "causal_attention")
# Rounding to bfloat16 happens before the noise, so a sum of many samples carries their rounding beyond the bound.


def problem(name):
    case = CASES[name]
    model = bf16_rounded(case.model())
    batch = case.batch(5).to(torch.bfloat16).to(torch.float32)
    per_sample = per_sample_gradients(case, model, batch)
    options = {"max_grad_norm": bound_between(release(per_sample).norms)}
    in_float32 = Case(
        case.build,
        case.inputs,
        case.targets,
        lambda output, targets: case.loss(map_tensors(as_float(torch.float32), output), targets),
        name=name,
    )
    return in_float32, model, batch, options, release(per_sample, **options).gradients


def assert_close(actual, expected):
    errors = relative_errors(actual, expected)
    assert all(error < 2e-2 for error in errors.values()), errors


@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_float32_gradients(name):
    case, model, batch, options, expected = problem(name)
    module = torch.compile(model, backend="flashdp", fullgraph=True, options={**QUIET, **options})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(*batch.args, **batch.kwargs)
    case.loss(output, batch.targets).mean().backward()
    released = gradients(model)
    assert all(g.dtype == torch.float32 for g in released.values())
    assert any(not torch.equal(g, g.bfloat16().float()) for g in released.values()), "sums are float32, not rounded"
    assert_close(released, expected)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters(name):
    case, model, batch, options, expected = problem(name)
    model = model.bfloat16()
    module = torch.compile(model, backend="flashdp", fullgraph=True, options={**QUIET, **options})
    loss_of(case, module, batch.to(torch.bfloat16), "outside", "mean").backward()
    released = gradients(model)
    assert all(g.dtype == torch.bfloat16 for g in released.values())
    assert_close(released, expected)


def test_autocast_sum_over_many_samples_is_not_rounded():
    """A weighted sum in bfloat16 would lose one sample among a thousand."""
    model = nn.Linear(64, 1, bias=False)
    module = compiled(model, loss_reduction="sum")
    x = torch.rand(1, 64).expand(1024, 64).contiguous()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x).float().sum(1).sum().backward()
        everyone = flat(gradients(model))
        module(x).float().sum(1)[:-1].sum().backward()
        without_the_last = flat(gradients(model))
    assert abs(float((everyone - without_the_last).norm()) - 1) < 1e-2


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_noise_is_added_before_rounding(batch):
    """Noise hides C. Where the sum of a thousand samples was rounded first, one of them moved it by up to 2.5 C."""
    assert noised_dtypes(nn.Linear(16, 4).bfloat16(), batch) == [torch.float32] * 2


def test_noise_is_added_in_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert noised_dtypes(nn.Linear(16, 4), 4, torch.float32) == [torch.float32] * 2


def noised_dtypes(model, batch, dtype=torch.bfloat16):
    """What the noise is added to in the finished graph; one entry for every parameter."""
    with recorded_graphs() as graphs:
        module = compiled(model, noise_multiplier=1.0)
        module(torch.randn(batch, 16, dtype=dtype)).float().sum(1).sum().backward()
    noise = [n for n in graphs[0].nodes if n.target is torch.ops.flashdp.add_noise.default]
    assert len(noise) == len(list(model.parameters()))
    return [n.args[0].meta["val"].dtype for n in noise]
