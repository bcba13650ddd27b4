"""Where the loss is, and whether it is a mean or a sum, does not change what is released."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privacy.steps import QUIET, compiled, flat, gradients
from zoo import CASES, LossInside, Model
from zoo.training import PLACES, compiled as compiled_case, loss_of


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", ["mlp", "layer_norm", "embedding_then_linear"])
def test_mean_and_sum_and_place_agree(name, batch):
    """The sum over L equals the mean with L; six compilations of one release."""
    case, found = CASES[name], []
    batch = case.batch(batch)
    for place in PLACES:
        for reduction in ("mean", "sum"):
            torch._dynamo.reset()
            model = case.model()
            options = {**QUIET, "loss_reduction": reduction, "expected_batch_size": 4, "max_grad_norm": 0.3}
            module = compiled_case(case, model, place, reduction, "flashdp", options)
            loss_of(case, module, batch, place, reduction).backward()
            found.append(flat(gradients(model)) * (4 if reduction == "mean" else 1))
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-5, atol=1e-7)
    assert found[0].norm() > 0.1


def test_the_wrong_reduction_still_keeps_the_bound():
    """A mean declared as a sum is clipped less, and noised as a sum: private, only badly scaled."""
    model = nn.Linear(4, 3)
    module = compiled(model, loss_reduction="sum", max_grad_norm=0.5)
    x = 1e4 * torch.randn(6, 4)
    weights = torch.eye(6)[2]
    (module(x).sum(1) * weights).mean().backward()
    assert flat(gradients(model)).norm() <= 0.5 * (1 + 2.0**-9)


def test_several_outputs():
    """Two heads, each with a loss of its own outside: a sample's gradient is that of the sum of its losses."""
    parts = {"body": nn.Linear(4, 6), "one": nn.Linear(6, 3), "two": nn.Linear(6, 2)}

    def heads(m, x):
        hidden = m.body(x).tanh()
        return {"classes": m.one(hidden), "values": (m.two(hidden), hidden)}

    model = Model(heads, **parts)
    x, y, z = torch.randn(5, 4), torch.randint(0, 3, (5,)), torch.randn(5, 2)

    def losses(out, y, z):
        values, hidden = out["values"]
        each = F.cross_entropy(out["classes"], y, reduction="none")
        return each + (values - z).square().sum(1) + 0.1 * hidden.square().sum(1)

    expected = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    exact = copy.deepcopy(model).double()
    for i in range(5):
        loss = losses(exact(x[i : i + 1].double()), y[i : i + 1], z[i : i + 1].double()).sum()
        own = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))])
        expected += own * min(1.0, 0.4 / float(own.norm())) / 5
    losses(compiled(model, max_grad_norm=0.4)(x), y, z).mean().backward()
    assert (flat(gradients(model)) - expected).norm() < 1e-5 * expected.norm()


def test_an_output_that_the_loss_ignores():
    model = Model(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    module = compiled(model, max_grad_norm=0.4, loss_reduction="sum")
    module(torch.randn(1, 4))[0].sum().mul(1e3).backward()
    found = gradients(model)
    assert abs(flat(found).norm() - 0.4) < 1e-3
    assert "b.weight" not in found or not found["b.weight"].any()


def test_backward_through_the_scalar_twice_its_size():
    """Tripling every loss does not move a clipped gradient."""
    model = nn.Linear(4, 3)
    module = torch.compile(
        LossInside(model, lambda out, y: 1e3 * (out - y).square().sum(1), "mean"),
        backend="flashdp",
        fullgraph=True,
        options=QUIET,
    )
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    found = []
    for factor in (1.0, 3.0):
        (factor * module(y, x)).backward()
        found.append(flat(gradients(model)))
    assert torch.allclose(found[0], found[1], rtol=1e-5)
