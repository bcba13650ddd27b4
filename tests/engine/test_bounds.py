"""Bounds that move: along a schedule, or a quantile of the norms that is paid for from the step's own budget."""

import copy
import math

import pytest
import torch
from torch import nn

from engine.runs import BATCH, BOUND, backward, copies, engine, mlp, moved, samples, setup
from flashdp_compile import BudgetExhaustedError, OptionError, PrivacyEngine, Quantile, Refusal
from flashdp_compile.engine.bound_rules import deviation_of_votes
from flashdp_compile.errors import UnprotectedGradientError
from flashdp_compile.runtime import clipping

GROUPS = {
    "flat": [("0.weight", "0.bias", "2.weight", "2.bias")],
    "per_layer": [("0.weight", "0.bias"), ("2.weight", "2.bias")],
}


def per_sample(model, x):
    """{name: [B, ...]} of each sample's own gradient, in float64."""
    exact, found = copy.deepcopy(model).double(), []
    named = dict(exact.named_parameters())
    for row in x.double().split(1):
        found.append(torch.autograd.grad(exact(row).square().sum(), list(named.values())))
    return {name: torch.stack(grads) for name, grads in zip(named, zip(*found, strict=True), strict=True)}


def norms(grads, group):
    return torch.cat([grads[name].flatten(1) for name in group], 1).norm(dim=1)


def expected_sum(model, x, clipping, factors):
    """The clipped sums over BATCH, group k clipped to BOUND / sqrt(K) * factors[k]."""
    grads, groups = per_sample(model, x), GROUPS[clipping]
    total = {}
    for group, factor in zip(groups, factors, strict=True):
        weights = (BOUND / math.sqrt(len(groups)) * factor / norms(grads, group)).clamp(max=1.0)
        total |= {name: torch.einsum("b,b...->...", weights, grads[name]) / BATCH for name in group}
    return [total[name] for name, _ in model.named_parameters()]


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_schedule(clipping, parts):
    its, model, compiled, optimizer = setup(
        bounds=lambda step: 2.0 * 0.25**step, clipping=clipping, micro_batches=parts
    )
    for step in range(3):
        start, factor = copies(model), 2.0 * 0.25**step
        expected = expected_sum(model, samples(), clipping, [factor] * len(GROUPS[clipping]))
        for x in samples().chunk(parts):
            optimizer.zero_grad()
            compiled(x).square().sum(1).mean().backward()
            optimizer.step()
        close(moved(model, start), expected)
        told = BOUND / math.sqrt(len(GROUPS[clipping])) * 0.25 * factor
        assert list(its.max_grad_norm().values()) == pytest.approx([told] * len(GROUPS[clipping]))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_quantile_without_noise(clipping, parts):
    how = Quantile(target=0.3, rate=0.7)
    its, model, compiled, optimizer = setup(bounds=how, clipping=clipping, micro_batches=parts)
    groups, seen = GROUPS[clipping], set()
    factors = [1.0] * len(groups)
    for _ in range(6):
        start, x = copies(model), samples()
        grads, expected = per_sample(model, x), expected_sum(model, x, clipping, factors)
        for part in x.chunk(parts):
            optimizer.zero_grad()
            compiled(part).square().sum(1).mean().backward()
            optimizer.step()
        close(moved(model, start), expected)
        for k, group in enumerate(groups):
            within = (norms(grads, group) <= BOUND / math.sqrt(len(groups)) * factors[k]).double().mean().item()
            factors[k] *= math.exp(-0.7 * (within - 0.3))
            seen.add(within)
        found = [bound / BOUND * math.sqrt(len(groups)) for bound in its.max_grad_norm().values()]
        assert found == pytest.approx(factors, rel=1e-5)
    assert len(seen) > 2, "the test sees bounds within and beyond which samples lie"


def test_bounds_find_the_median():
    its, model, compiled, optimizer = setup(bounds=Quantile(rate=0.5), max_grad_norm=1e-3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(60):
        backward(compiled, samples())
        optimizer.step()
    (found,) = its.max_grad_norm().values()
    inner = norms(per_sample(model, samples()), GROUPS["flat"][0]).sort().values
    assert inner[2] < found < inner[5]


def test_rows_of_padding_and_empty_batches_do_not_vote():
    its, model, compiled, optimizer = setup(bounds=Quantile(), micro_batches=3)
    parts = [torch.ones(4), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.zeros(0)]
    x = samples(10)
    grads = per_sample(model, x[:6])
    for rows, weights in zip(x.split([4, 4, 2]), parts, strict=True):
        rows = rows[: len(weights)]
        (compiled(rows).square().sum(1) * weights).sum().div(max(len(rows), 1)).backward()
        optimizer.step()
    votes = torch.where(norms(grads, GROUPS["flat"][0]) <= BOUND, 0.5, -0.5).sum().item()
    (found,) = its.max_grad_norm().values()
    assert found == pytest.approx(BOUND * math.exp(-0.2 * (votes / BATCH + 0.5 - 0.5)), rel=1e-5)


def test_a_sample_that_is_not_finite_does_not_vote():
    its, model, compiled, optimizer = setup(bounds=Quantile())
    x = samples()
    x[0, 0] = float("nan")
    votes = torch.where(norms(per_sample(model, x[1:]), GROUPS["flat"][0]) <= BOUND, 0.5, -0.5).sum().item()
    backward(compiled, x)
    optimizer.step()
    assert list(its.max_grad_norm().values()) == pytest.approx([BOUND * math.exp(-0.2 * votes / BATCH)], rel=1e-5)


@pytest.mark.parametrize("sigma", [0.5, 3.0])
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_what_a_step_reveals_is_what_is_accounted_for(share, groups, sigma):
    """One sample moves the sums by 1 (in units of C) and the votes by 1/2 in each group: a Gaussian mechanism whose
    deviations are scaled to one has the sensitivity 1 / sigma."""
    its = engine(bounds=Quantile(share=share), noise_multiplier=sigma)
    of_gradients = its._steps._sigma_of_gradients()
    of_votes = deviation_of_votes(sigma, share, groups)
    assert math.hypot(1 / of_gradients, math.sqrt(groups) / 2 / of_votes) == pytest.approx(1 / sigma, rel=1e-12)


@pytest.mark.parametrize("noise", ["secure", "philox"])
def test_the_noise_of_both(noise):
    """Inputs are zero, and so are the gradients: what is released is noise alone."""
    share, rate, sigma = 0.2, 0.01, 1.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 400, bias=False), nn.Tanh(), nn.Linear(400, 1, bias=False))
    how = Quantile(share=share, rate=rate)
    its = engine(bounds=how, noise_multiplier=sigma, noise=noise, clipping="per_layer", steps=400)
    optimizer, compiled = its.attach(torch.optim.SGD(model.parameters(), lr=0.0)), its.compile(model)
    logs, before, drawn = [], torch.zeros(2), []
    for _ in range(300):
        scales = its._steps._bounds.state.scales.clone() if before.any() else torch.ones(2)
        compiled(torch.zeros(BATCH, 3)).square().sum(1).mean().backward()
        optimizer.step()
        drawn.append(model[0].weight.grad.std() / scales[0])
        after = its._steps._bounds.state.scales.log()
        logs.append(after - before)
        before = after.clone()
    assert torch.stack(drawn).mean().item() == pytest.approx(sigma * BOUND / BATCH / math.sqrt(1 - share), rel=0.01)
    votes = torch.stack(logs) / -rate  # w - 1/2, with target 1/2
    deviation = deviation_of_votes(sigma, share, 2) / BATCH
    assert votes.mean().abs() < 4 * deviation / math.sqrt(600)
    assert votes.std().item() == pytest.approx(deviation, rel=0.12)
    assert abs(torch.corrcoef(votes.T)[0, 1]) < 0.25, "groups have noise of their own"


def test_epsilon_is_that_of_the_plan():
    plan = {"target_delta": 1e-5, "target_epsilon": 3.0, "sample_size": 1000, "expected_batch_size": 50, "steps": 20}
    fixed, moving = (PrivacyEngine(**plan, accountant="rdp", bounds=bounds) for bounds in (None, Quantile()))
    assert fixed.noise_multiplier == moving.noise_multiplier
    assert moving._steps._sigma_of_gradients() > moving.noise_multiplier


def test_a_resumed_run_equals_an_unbroken_one():
    settings = {"bounds": Quantile(), "noise_multiplier": 1.0, "seed": 5, "clipping": "per_layer"}

    def go(its, model, compiled, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            backward(compiled, samples())
            optimizer.step()

    whole = setup(**settings)
    go(*whole, 4)
    first = setup(**settings)
    go(*first, 2)
    saved, weights = first[0].state_dict(), first[1].state_dict()
    second = setup(**settings)
    second[1].load_state_dict(weights)
    second[0].load_state_dict(saved)
    go(*second, 2)
    assert second[0].max_grad_norm() == whole[0].max_grad_norm()
    for a, b in zip(second[1].parameters(), whole[1].parameters(), strict=True):
        assert torch.equal(a, b)
    late, model = engine(**settings), nn.Linear(3, 1)
    late.load_state_dict(saved)
    with pytest.raises(Refusal, match="had 2 clipping groups, and this model has 1"):
        backward(late.compile(model), samples())


@pytest.mark.parametrize("changed", [{}, {"bounds": Quantile(target=0.6)}, {"bounds": lambda step: 1.0}])
def test_other_bounds_are_not_resumed(changed):
    with pytest.raises(OptionError, match="^bounds is"):
        engine(**changed).load_state_dict(engine(bounds=Quantile()).state_dict())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"target": 0.0}, "target=0.0"),
        ({"target": 1}, "target=1"),
        ({"share": 1.0}, "share=1.0"),
        ({"rate": -1.0}, "rate=-1.0"),
    ],
)
def test_values_that_are_not_allowed(how, words):
    with pytest.raises(OptionError, match=words):
        Quantile(**how)


@pytest.mark.parametrize("bounds", ["median", 0.5, lambda step: -1.0, lambda step: float("nan"), lambda step: None])
def test_what_is_no_way_to_move_a_bound(bounds):
    with pytest.raises(OptionError, match="bounds"):
        engine(bounds=bounds)


def test_the_option_is_the_engines():
    with pytest.raises(OptionError, match="options holds 'from_engine'"):
        engine(options={"from_engine": 1})
    with pytest.raises(OptionError, match="what a PrivacyEngine hands to the graphs of a model"):
        torch.compile(mlp(), backend="flashdp", options={"from_engine": 1, "compiler": "eager"})(samples())


def test_one_model_for_each_engine():
    its, _, compiled, _ = setup(bounds=Quantile(), clipping="per_layer")
    backward(compiled, samples())
    with pytest.raises(Refusal, match="second model"):
        backward(its.compile(nn.Linear(3, 1)), samples())


def test_a_parameter_that_nothing_depends_on():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = nn.Linear(3, 1), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.used(x) + 0 * self.other.detach()

    its, model = engine(bounds=Quantile(), clipping="per_layer"), Unused()
    with pytest.raises(Refusal, match=r"depends on the parameters of \(root\)"):
        backward(its.compile(model), samples())
    its, model = engine(bounds=Quantile(), clipping="per_layer"), Unused()
    model.other.requires_grad_(False)
    backward(its.compile(model), samples())


def test_sums_of_an_engine_without_moving_bounds():
    """Two engines with the same divisor: what one has clipped, the other does not step on."""
    its, model = engine(), mlp()
    other = engine(bounds=Quantile())
    compiled, optimizer = its.compile(model), other.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    backward(compiled, samples())
    with pytest.raises(UnprotectedGradientError):
        optimizer.step()


def test_two_optimizers_move_bounds_once():
    its, model = engine(bounds=Quantile()), mlp()
    compiled = its.compile(model)
    optimizers = [its.attach(torch.optim.SGD(layer.parameters(), lr=1.0)) for layer in (model[0], model[2])]
    start, expected = copies(model), expected_sum(model, samples(), "flat", [1.0])
    votes = torch.where(norms(per_sample(model, samples()), GROUPS["flat"][0]) <= BOUND, 0.5, -0.5).sum().item()
    backward(compiled, samples())
    for optimizer in optimizers:
        optimizer.step()
    close(moved(model, start), expected)
    assert its.steps_done == 1
    assert list(its.max_grad_norm().values()) == pytest.approx([BOUND * math.exp(-0.2 * votes / BATCH)], rel=1e-5)


def test_votes_are_used_once():
    """Optimizers of two models under one bound, out of phase: a backward of which one has made a step votes in no
    other."""
    its, model, other = engine(bounds=Quantile()), mlp(), mlp(5)
    compiled, second = its.compile(model), its.compile(other)
    a, b = (its.attach(torch.optim.SGD(layer.parameters(), lr=0.0)) for layer in (model[0], model[2]))
    c = its.attach(torch.optim.SGD(other.parameters(), lr=0.0))
    votes = [
        torch.where(norms(per_sample(m, samples()), GROUPS["flat"][0]) <= BOUND, 0.5, -0.5).sum().item()
        for m in (model, other)
    ]
    backward(compiled, samples())
    a.step()
    backward(second, samples())
    c.step()
    b.step()
    assert its.steps_done == 3
    logs = (
        -0.2 * (votes[0] / BATCH),
        -0.2
        * torch.where(
            norms(per_sample(other, samples()), GROUPS["flat"][0]) <= BOUND * math.exp(-0.2 * votes[0] / BATCH),
            0.5,
            -0.5,
        )
        .sum()
        .item()
        / BATCH,
    )
    assert list(its.max_grad_norm().values()) == pytest.approx([BOUND * math.exp(sum(logs))], rel=1e-5)
    assert torch.allclose(model[2].weight.grad.double(), expected_sum(model, samples(), "flat", [1.0])[2])


def test_a_logical_batch_between_whose_parts_bounds_have_moved():
    its, model = engine(bounds=Quantile(), micro_batches=2), mlp()
    compiled = its.compile(model)
    a, b = (its.attach(torch.optim.SGD(layer.parameters(), lr=0.0)) for layer in (model[0], model[2]))
    backward(compiled, samples(4))
    its._steps._attached[b].clear()  # from here on it is one micro-batch behind
    a.step()
    backward(compiled, samples(4))
    b.step()
    a.step()
    assert its.steps_done == 1 and its.stepped
    backward(compiled, samples(4))
    with pytest.raises(UnprotectedGradientError, match="bounds have moved between them"):
        b.step()
    assert its.steps_done == 1


@pytest.mark.parametrize("max_grad_norm", [BOUND, {"a.*": 0.2, "b.*": 0.4}])
def test_groups_in_another_order(max_grad_norm):
    """Graphs of one model meet its layers in different orders; each group has its own scale all the same."""

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.flipped = nn.Linear(3, 3), nn.Linear(3, 3), False

        def forward(self, x):
            first, second = (self.b, self.a) if self.flipped else (self.a, self.b)
            return second(first(x).tanh())

    torch.manual_seed(0)
    model = Either()
    its = engine(bounds=Quantile(rate=1.0), clipping="per_layer", max_grad_norm=max_grad_norm)
    compiled, optimizer = its.compile(model), its.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    start = {"a": BOUND / math.sqrt(2), "b": BOUND / math.sqrt(2)}
    bounds = start if max_grad_norm == BOUND else {"a": 0.2, "b": 0.4}
    for flipped in (False, True, False, True):
        model.flipped = flipped
        optimizer.zero_grad()
        grads = per_sample(model, samples())
        backward(compiled, samples())
        optimizer.step()
        for group in ("a", "b"):
            lengths = norms(grads, (f"{group}.weight", f"{group}.bias"))
            weights = (bounds[group] / lengths).clamp(max=1.0)
            expected = torch.einsum("b,bij->ij", weights, grads[f"{group}.weight"]) / BATCH
            close([getattr(model, group).weight.grad], [expected])
            bounds[group] *= math.exp(-((lengths <= bounds[group]).double().mean().item() - 0.5))
        assert its.max_grad_norm() == pytest.approx(bounds, rel=1e-5)


def test_a_parameter_that_was_replaced():
    its, model, compiled, optimizer = setup(bounds=Quantile(), clipping="per_layer")
    backward(compiled, samples())
    optimizer.step()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer = its.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    backward(compiled, samples())
    with pytest.raises(UnprotectedGradientError, match="has taken the place of one that was compiled"):
        optimizer.step()
    assert its.steps_done == 1
    optimizer.zero_grad()
    torch.compiler.reset()
    backward(compiled, samples())
    optimizer.step()
    assert its.steps_done == 2


def test_a_schedule_that_ends_with_the_run():
    table = [1.0, 0.5, 0.25]
    its, model, compiled, optimizer = setup(bounds=lambda step: table[step], steps=3)
    for _ in table:
        backward(compiled, samples())
        optimizer.step()
        assert its.stepped
    backward(compiled, samples())
    with pytest.raises(BudgetExhaustedError):
        optimizer.step()
    again = engine(bounds=lambda step: table[step], steps=3)
    again.load_state_dict(its.state_dict())
    assert again.steps_left == 0


def test_a_schedule_that_says_nothing_costs_nothing():
    its, model, compiled, optimizer = setup(bounds=lambda step: torch.tensor(1.0 if step < 2 else math.inf))
    for _ in range(2):
        backward(compiled, samples())
        if its.steps_done < 1:
            optimizer.step()
    optimizer.zero_grad()
    its._steps._attached[optimizer].clear()
    backward(compiled, samples())
    with pytest.raises(OptionError, match=r"bounds\(2\)=.*within 2\^-60"):
        optimizer.step()
    assert its.steps_done == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_votes_of_a_backward_that_failed(ahead, monkeypatch):
    """An empty batch that follows, whose forward may have come before, counts none of them."""
    its, model, compiled, optimizer = setup(bounds=Quantile())
    loss = compiled(samples()).square().sum(1).mean()
    empty = compiled(samples(0)).square().sum() if ahead else None
    with monkeypatch.context() as broken:
        broken.setattr(clipping, "release_weights_into", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    (compiled(samples(0)).square().sum() if empty is None else empty).backward()
    optimizer.step()
    assert list(its.max_grad_norm().values()) == [BOUND]


def test_a_state_from_before_the_first_step():
    its, model, compiled, optimizer = setup(bounds=Quantile())
    saved = its.state_dict()
    backward(compiled, samples())
    optimizer.step()
    its.load_state_dict(saved)
    assert list(its.max_grad_norm().values()) == [BOUND]
