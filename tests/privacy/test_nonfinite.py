"""A sample whose gradient is not finite adds exactly zero, the others stay exact, and it is counted."""

import math

import pytest
import torch
from torch import nn

import flashdp_compile
from flashdp_compile.runtime.clipping import reset_nonfinite
from privacy.steps import QUIET, STRATEGIES, compiled, flat, gradients
from reference import per_sample_gradients, relative_errors, release
from zoo import CASES, Model

NAMES = ("linear_2d", "linear_3d", "layer_norm", "conv2d", "causal_attention", "tied_autoencoder", "embedding", "gpt")
OF_IDS = ("embedding", "gpt")  # no input can hold a nan, but the loss of a sample can
RANGED = ("layer_norm", "tied_autoencoder")  # a norm and a tanh bring 1e30 back into range
BAD = {"nan": float("nan"), "inf": float("inf"), "overflow": 1e30}
RUNS = [
    (name, strategy, kind)
    for name in NAMES
    for strategy in STRATEGIES
    for kind in BAD
    if kind == "nan" or (strategy == "auto" and name not in (*RANGED, *OF_IDS))
]


@pytest.mark.parametrize(("name", "strategy", "kind"), RUNS)
def test_a_bad_sample_adds_zero(name, strategy, kind):
    case = CASES[name]
    model, batch = case.model(), case.batch(4)
    good = per_sample_gradients(case, model, batch)
    good = {n: g.index_fill(0, torch.tensor([2]), 0.0) for n, g in good.items()}
    options = {"max_grad_norm": 0.4, "expected_batch_size": 4}
    expected = release(good, **options).gradients
    weights = torch.ones(4)
    if name in OF_IDS:
        weights[2] = BAD[kind]
    else:
        batch.args[0].select(case.batch_dim, 2).view(-1)[0] = BAD[kind]
    reset_nonfinite()
    options = {**QUIET, **case.options, **options, "norm_strategy": strategy}
    module = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    (case.losses(module, batch) * weights).mean().backward()
    released = gradients(model)
    assert flashdp_compile.nonfinite_samples() == 1
    assert all(g.isfinite().all() for g in released.values())
    assert all(error < 1e-5 for error in relative_errors(released, expected).values())


@pytest.mark.parametrize("clip_fn", ["hard", "automatic", "normalize"])
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_but_bad_samples(batch, clip_fn):
    """B=1 has a way of its own; what is left is zero, not nan."""
    reset_nonfinite()
    model = nn.Linear(3, 2)
    module = compiled(model, clip_fn=clip_fn)
    module(torch.full((batch, 3), math.nan)).sum(1).mean().backward()
    assert all(not g.any() for g in gradients(model).values())
    assert flashdp_compile.nonfinite_samples() == batch
    module(torch.full((batch, 3), math.inf)).sum(1).mean().backward()
    assert flashdp_compile.nonfinite_samples() == 2 * batch
    module(torch.full((batch, 3), 1.0)).sum(1).mean().backward()
    assert flashdp_compile.nonfinite_samples() == 2 * batch
    assert all(g.any() for g in gradients(model).values())


def test_a_bad_loss_weight():
    """The tangent of one sample is not finite: a loss outside of the compiled region."""
    model = nn.Linear(3, 2)
    module = compiled(model, loss_reduction="sum", max_grad_norm=100.0)
    x = torch.randn(4, 3)
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        (module(x).sum(1) * torch.tensor([1.0, 1.0, bad, 1.0])).sum().backward()
        released = gradients(model)
        kept = x[[0, 1, 3]].sum(0)
        assert torch.allclose(released["weight"], kept.expand(2, 3), atol=1e-5)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_matrix_that_cannot_be_factored(compiler):
    """Where compiled code checks factorizations, one sample could stop the step of all; where not, it adds zero."""
    model = Model(lambda m, x: torch.linalg.solve(x * m.scale, x.new_ones(3, 1)), scale=nn.Parameter(torch.rand(3) + 1))
    x = torch.eye(3) + 0.1 * torch.randn(4, 3, 3)
    module = compiled(model, loss_reduction="sum", max_grad_norm=100.0, compiler=compiler)
    reset_nonfinite()
    x[1] = 0.0
    if torch.__version__ >= (2, 12):
        with pytest.raises(flashdp_compile.Refusal, match="solve_ex"):
            module(x)
        return
    module(x).sum().backward()
    released = gradients(model)
    model(x[[0, 2, 3]]).sum().backward()
    assert torch.allclose(released["scale"], gradients(model)["scale"], rtol=1e-4)
    assert flashdp_compile.nonfinite_samples() == 1


def test_training_goes_on():
    """With noise, an optimizer and one bad sample in every batch; parameters stay finite and the loss falls."""
    model = Model(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(4, 8), b=nn.Linear(8, 1))
    options = {"noise_multiplier": 0.05, "expected_batch_size": 16}
    module = compiled(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reset_nonfinite()
    x = torch.randn(16, 4)
    y = x[:, :1]
    x[5, 0] = math.nan
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        each = (module(x) - y).square().mean(1)
        each.mean().backward()
        optimizer.step()
        losses.append(float(each[:5].mean()))
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]
    assert flashdp_compile.nonfinite_samples() == 25


def test_only_the_group_that_is_bad_is_dropped():
    """A sample can be fine in one group and not in another; it is still one sample."""
    model = Model(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    reset_nonfinite()
    module = compiled(model, clipping="per_layer", loss_reduction="sum")
    one, two = module(torch.randn(3, 3))
    (one.sum(1) + two.sum(1) * torch.tensor([1.0, math.nan, 1.0])).sum().backward()
    both = gradients(model)
    assert all(g.isfinite().all() for g in both.values())
    each = 1 / math.sqrt(2)  # the bound of a group; the bias alone has norm sqrt(3), so every sample is clipped
    assert flat({n: both[n] for n in ("a.bias",)}).norm() > 1.5 * each * 0.5
    assert flashdp_compile.nonfinite_samples() == 1


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_sample_is_counted_once_whatever_the_groups(batch, compiler):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    reset_nonfinite()
    x = torch.randn(batch, 3)
    x[-1] = math.nan
    compiled(model, clipping="per_layer", compiler=compiler)(x).sum(1).mean().backward()
    assert flashdp_compile.nonfinite_samples() == 1


def test_samples_that_are_bad_in_different_groups():
    """Of five samples one is bad in both groups, and two in one of them each: three are counted."""
    model = Model(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    reset_nonfinite()
    one, two = compiled(model, clipping="per_layer", loss_reduction="sum")(torch.randn(5, 3))
    of_a, of_b = torch.ones(5), torch.ones(5)
    of_a[[0, 1]], of_b[[0, 2]] = math.nan, math.inf
    (one.sum(1) * of_a + two.sum(1) * of_b).sum().backward()
    assert flashdp_compile.nonfinite_samples() == 3
    assert all(g.isfinite().all() and g.any() for g in gradients(model).values())
