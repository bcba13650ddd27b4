"""The scale of a loss, as a backward looks it up."""

import pytest
import torch
from torch import nn

import flashdp_compile  # noqa: F401  registers the backend
from flashdp_compile.errors import UnprotectedGradientError
from flashdp_compile.runtime import scaling

NEVER = 2**31 - 1


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=NEVER)


def test_a_scaler_keeps_its_place():
    one, other = scaler(4.0), scaler(4.0)
    assert scaling.place(one) == scaling.place(one) != scaling.place(other)


def test_the_scale_is_the_present_one_and_a_copy():
    one = scaler(8.0)
    one.scale(torch.ones(1))
    found = scaling.grad_scale(torch.ones(3), scaling.place(one))
    assert found.shape == () and found.dtype == torch.float32 and float(found) == 8.0
    one.update(2.0)
    assert float(found) == 8.0 and float(scaling.grad_scale(torch.ones(3), scaling.place(one))) == 2.0


def test_the_op_is_well_behaved():
    one = scaler(8.0)
    one.scale(torch.ones(1))
    arguments = torch.ones(3), scaling.place(one)
    torch.library.opcheck(
        torch.ops.flashdp.grad_scale.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_a_loss_that_was_not_scaled():
    model = nn.Linear(3, 2)
    options = {"grad_scaler": scaler(8.0), "compiler": "eager", "noise_multiplier": 0.5}
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    with pytest.raises(UnprotectedGradientError, match=r"scaler\.scale\(loss\)\.backward\(\)"):
        compiled(torch.randn(4, 3)).square().sum(1).mean().backward()
    assert all(p.grad is None for p in model.parameters())
