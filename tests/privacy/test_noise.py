"""The noise of a release: N(0, (sigma C (1 + slack) / L)^2) for every element, independent of everything else."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from flashdp_compile.passes.groups import sensitivity
from flashdp_compile.testing import replay_noise
from privacy.steps import EMPTY_SLACK, SINGLE_SLACK, compiled, flat, gradients, recorded_plans
from zoo import Model

SIGMA, BOUND, WIDTH = 1.7, 0.6, 330
SEEDED = {"noise_multiplier": SIGMA, "seed": 20}  # statistics that come out the same on every run


def two_layers(dtype=torch.float32):
    """Three tensors: a bias, and two weights of one shape with 108900 elements each."""
    torch.manual_seed(0)
    parts = {"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH, bias=False)}
    return Model(lambda m, x: m.b(m.a(x).tanh()), **parts).to(dtype)


def replay():
    """As in a new process: no compiled code, and the noise of a seed from its start."""
    torch._dynamo.reset()
    replay_noise()


def step(module, model, x):
    loss = module(x).square().sum(1)
    loss.mean().backward()
    return gradients(model)


def noise_of(model, x, **options):
    """{name: noise}, in units of its expected deviation but for the divisor L."""
    quiet = step(compiled(model, **options, max_grad_norm=BOUND), model, x)
    replay()
    with recorded_plans() as plans:
        noisy = step(compiled(model, **{**options, **SEEDED, "max_grad_norm": BOUND}), model, x)
    slack = plans[-1].slack if plans else SINGLE_SLACK if len(x) else EMPTY_SLACK
    return {n: (noisy[n].double() - quiet[n].double()) / (SIGMA * BOUND * (1 + slack)) for n in quiet}


def assert_standard_normal(values, divisor=1.0, within=0.01):
    """Deviation 1 / divisor within 1 %, mean zero within five standard errors, and normal."""
    values = values.flatten().double() * divisor
    assert abs(float(values.std()) - 1) < within
    assert abs(float(values.mean())) < 5 / math.sqrt(values.numel())
    assert stats.kstest(values[:20000].numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(values.numpy(), "norm").statistic < 2.5 / math.sqrt(values.numel()) + 1e-3


def correlation(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return float((a - a.mean()) @ (b - b.mean()) / (a.std() * b.std() * a.numel()))


def assert_uncorrelated(a, b):
    assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel())


GROUPS = {"*.weight": "weights", "*": "rest"}
CONFIGURATIONS = {
    "own size": ({}, 5, 5),
    "expected": ({"expected_batch_size": 32}, 5, 32),
    "sum": ({"loss_reduction": "sum"}, 5, 1),
    "sum, expected": ({"loss_reduction": "sum", "expected_batch_size": 32}, 5, 1),
    "per layer": ({"clipping": "per_layer", "expected_batch_size": 32}, 5, 32),
    "groups": ({"clipping": GROUPS}, 5, 5),
    "one": ({}, 1, 1),
    "one, expected, per layer": ({"expected_batch_size": 32, "clipping": "per_layer"}, 1, 32),
    "none": ({}, 0, 1),
    "none, expected": ({"expected_batch_size": 32}, 0, 32),
    "none, groups, sum": ({"clipping": GROUPS, "loss_reduction": "sum"}, 0, 1),
    "materialized": ({"norm_strategy": "outer"}, 3, 3),
    "automatic": ({"clip_fn": "automatic"}, 3, 3),
    "normalize": ({"clip_fn": "normalize"}, 3, 3),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_deviation(name):
    options, batch, divisor = CONFIGURATIONS[name]
    noise = noise_of(two_layers(), torch.randn(batch, WIDTH), **options)
    for values in noise.values():
        assert abs(float(values.mean())) * divisor < 5 / math.sqrt(values.numel())
        assert abs(float(values.std()) * divisor - 1) < (0.01 if values.numel() > 1e5 else 0.2)
    assert_standard_normal(flat(noise), divisor)


def test_bounds_of_each_group_share_one_deviation():
    """The root of the sum of squared bounds, on every parameter: sqrt(0.3^2 + 0.4^2) = 0.5."""
    options = {"clipping": "per_layer", "expected_batch_size": 8}
    model, x = two_layers(), torch.randn(3, WIDTH)
    bounds = {"max_grad_norm": {"a.*": 0.3, "b.*": 0.4}}
    quiet = step(compiled(model, **options, **bounds), model, x)
    replay()
    with recorded_plans() as plans:
        noisy = step(compiled(model, **{**options, **bounds, "noise_multiplier": 2.0, "seed": 20}), model, x)
    assert math.isclose(sensitivity(plans[0].groups), 0.5)
    expected = 2.0 * 0.5 * (1 + plans[0].slack) / 8
    for name in ("a.weight", "b.weight"):
        assert_standard_normal((noisy[name].double() - quiet[name].double()) / expected)


@pytest.mark.parametrize("sizes", [(5, 2, 1, 0)])
@pytest.mark.parametrize("options", [{}, {"expected_batch_size": 8}], ids=["own size", "expected"])
def test_deviation_where_the_batch_size_is_dynamic(options, sizes):
    model = two_layers()
    quiet = compiled(model, max_grad_norm=BOUND, **options)
    with recorded_plans() as plans:
        noisy = compiled(model, **{**options, **SEEDED, "max_grad_norm": BOUND})
        for batch in sizes:
            x = torch.randn(batch, WIDTH)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            with_noise, without = flat(step(noisy, model, x)), flat(step(quiet, model, x))
            expected = SIGMA * BOUND * (1 + plans[-1].slack) / options.get("expected_batch_size", max(batch, 1))
            assert_standard_normal((with_noise - without) / expected)
    assert len(plans) == 2


def test_deviation_of_bfloat16_parameters():
    """The noise is rounded with the gradient, so it is coarse, but as long as it should be."""
    noise = noise_of(two_layers(torch.bfloat16), torch.randn(4, WIDTH, dtype=torch.bfloat16))
    for name in ("a.weight", "b.weight"):
        assert abs(float(noise[name].std()) * 4 - 1) < 0.01
        assert abs(float(noise[name].mean())) * 4 < 5 / math.sqrt(noise[name].numel())


def test_parameters_of_equal_shape_and_steps_are_independent():
    model, x = two_layers(), torch.randn(4, WIDTH)
    quiet = step(compiled(model), model, x)
    replay()
    module = compiled(model, noise_multiplier=1.0, seed=20)
    first, second, third = ({n: g - quiet[n] for n, g in step(module, model, x).items()} for _ in range(3))
    assert_uncorrelated(first["a.weight"], first["b.weight"])
    assert_uncorrelated(first["a.weight"], first["b.weight"].T)
    assert_uncorrelated(first["a.bias"], first["a.weight"].flatten()[:WIDTH])
    for later in (second, third):
        for name in first:
            assert_uncorrelated(first[name], later[name])
        assert_uncorrelated(first["a.weight"], later["b.weight"])
    for shift in (1, 2, 3, 4, WIDTH):  # neighbours within a tensor: four values come from one block of random bits
        values = first["a.weight"].flatten()
        assert_uncorrelated(values[shift:], values[:-shift])
        assert_uncorrelated(values[shift:].square(), values[:-shift].square())
    assert_standard_normal(torch.cat([flat(n) for n in (first, second, third)]) * 4, within=0.02)


def test_every_backward_draws_anew():
    """Also where one forward is gone through twice."""
    model, x = two_layers(), torch.randn(4, WIDTH)
    module = compiled(model, noise_multiplier=1.0)
    loss = module(x).square().sum(1).mean()
    parameters = list(model.parameters())
    draws = [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(3)]
    quiet = torch.autograd.grad(compiled(model)(x).square().sum(1).mean(), parameters)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for one, other, exact in zip(draws[a], draws[b], quiet, strict=True):
            assert not torch.equal(one, other)
            assert_uncorrelated(one - exact, other - exact)


def run_with(seed, model=None, x=None, steps=2):
    replay()
    torch.manual_seed(5)
    model = two_layers() if model is None else model
    x = torch.ones(4, WIDTH) if x is None else x
    module = compiled(model, noise_multiplier=1.0, seed=seed)
    return [step(module, model, x) for _ in range(steps)]


def test_a_seed_replays_bit_for_bit():
    first, again, other = run_with(7), run_with(7), run_with(8)
    for one, two, three in zip(first, again, other, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not any(torch.equal(one[name], three[name]) for name in one)
    assert not torch.equal(first[0]["a.weight"], first[1]["a.weight"])


def test_without_a_seed_torch_manual_seed_does_not_replay():
    first, again = run_with(None), run_with(None)
    assert not any(torch.equal(first[0][name], again[0][name]) for name in first[0])


def test_noise_does_not_depend_on_the_data():
    model = two_layers()
    noise = []
    for x in (torch.ones(4, WIDTH), 1e-3 * torch.randn(4, WIDTH), torch.zeros(4, WIDTH)):
        noisy = run_with(7, model, x, steps=1)[0]
        replay()
        quiet = step(compiled(model), model, x)
        noise.append({name: noisy[name] - quiet[name] for name in quiet})
    for other in noise[1:]:
        for name, values in other.items():
            assert torch.allclose(values, noise[0][name], rtol=0, atol=1e-6)


def test_noise_and_dropout_do_not_disturb_each_other():
    """The same dropout masks with and without noise, the same noise whatever was drawn from torch's generator."""
    model = Model(lambda m, x: nn.functional.dropout(m.a(x), 0.5, training=True), a=nn.Linear(64, 64))
    x = torch.randn(4, 64)

    def run(noise_multiplier, generator_seed):
        replay()
        module = compiled(model, noise_multiplier=noise_multiplier, seed=7)
        torch.manual_seed(generator_seed)
        output = module(x)
        output.sum(1).mean().backward()
        return output.detach(), flat(gradients(model)), torch.get_rng_state()

    noisy, quiet, other = run(1.0, 3), run(0.0, 3), run(1.0, 4)
    assert torch.equal(noisy[0], quiet[0])
    assert torch.equal(noisy[2], quiet[2])
    assert not torch.equal(noisy[0], other[0])
    assert torch.allclose(noisy[1] - quiet[1], other[1] - run(0.0, 4)[1], atol=1e-6)
