"""The judges are judged first: the zoo's samples are independent, and the oracle agrees with autograd and by hand."""

import copy
from math import inf, nan, sqrt

import pytest
import torch
from torch import nn

from reference import (
    GAMMA,
    bound_between,
    groups_of,
    per_sample_gradients,
    reference_gradients,
    relative_errors,
    release,
    trainable,
)
from zoo import CASES, REFUSED, Case, LossInside, Model
from zoo.adversarial import mixes_samples
from zoo.sharing import TiedLanguageModel
from zoo.training import compiled_gradients

every_case = pytest.mark.parametrize("name", CASES)


def in_float64(case: Case, seed: int = 0) -> tuple[nn.Module, object, object]:
    """The model and two different batches."""
    size = case.batch_sizes[0]
    return case.model(seed).double(), case.batch(size, 0).to(torch.float64), case.batch(size, 1).to(torch.float64)


def test_the_zoo_is_as_large_as_promised():
    different = [case for case in CASES.values() if "equal" not in case.tags]
    assert len(different) >= 48
    assert len(CASES) - len(different) >= 20
    assert sum("lookalike" in case.tags for case in different) >= 25
    assert len(REFUSED) >= 40


@every_case
def test_samples_are_independent(name):
    """Another sample j moves loss j and no other."""
    case = CASES[name]
    model, batch, other = in_float64(case)
    losses = case.losses(model, batch)
    assert losses.shape == (batch.size,) and losses.isfinite().all()
    for j in (0, batch.size - 1):
        moved = (case.losses(model, batch.with_sample(j, other)) - losses).abs() / (1 + losses.abs())
        assert moved[j] > 1e-6
        moved[j] = 0
        assert moved.max() < 1e-12


@every_case
def test_reference_is_autograd_when_nothing_is_clipped(name):
    case = CASES[name]
    model, batch, _ = in_float64(case)
    released = reference_gradients(case, model, batch, max_grad_norm=1e30, loss_reduction="sum")
    parameters = trainable(model)
    found = torch.autograd.grad(case.losses(model, batch).sum(), list(parameters.values()), allow_unused=True)
    assert max(relative_errors(dict(zip(parameters, found, strict=True)), released.gradients).values()) < 1e-10
    assert ("idle" in case.tags) == any(gradient is None for gradient in found)


@every_case
def test_the_case_is_well_conditioned(name):
    """Rounding the parameters to float32, half an ulp at most, moves exact gradients far less than the backend may.

    A case that fails this would be off by 1e-5 in any program that computes in float32, on one machine or another.
    """
    case = CASES[name]
    model, batch = case.model(), case.batch(case.batch_sizes[0])
    exact = per_sample_gradients(case, model, batch)
    options = {"clipping": "per_layer", "max_grad_norm": bound_between(release(exact, clipping="per_layer").norms)}
    expected = release(exact, **options)
    for _ in range(2):
        moved = copy.deepcopy(model).double()
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(1 + 2**-24 * torch.empty_like(parameter).uniform_(-1, 1))
        actual = release(per_sample_gradients(case, moved, batch), **options)
        assert max(relative_errors(actual.gradients, expected.gradients).values()) < 1e-6


@every_case
def test_float32_resolves_the_case(name):
    """float32 alone stays well inside the 1e-5 that the backend is held to, with samples clipped."""
    case = CASES[name]
    model, batch = case.model(), case.batch(case.batch_sizes[0])
    wide = per_sample_gradients(case, model, batch)
    narrow = {key: value.double() for key, value in per_sample_gradients(case, model, batch, torch.float32).items()}
    bound = bound_between(release(wide).norms)
    expected = release(wide, max_grad_norm=bound)
    assert 0 < (expected.factors < 1).sum() < batch.size
    assert max(relative_errors(release(narrow, max_grad_norm=bound).gradients, expected.gradients).values()) < 4e-6


@every_case
def test_loss_inside_is_the_loss_outside(name):
    case = CASES[name]
    model, batch, _ = in_float64(case)
    losses = case.losses(model, batch)
    for reduction in ("none", "mean", "sum"):
        inside = LossInside(model, case.loss, reduction)(batch.targets, *batch.args, **batch.kwargs)
        outside = losses if reduction == "none" else getattr(losses, reduction)()
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@every_case
def test_groups_split_a_wrapped_model_alike(name):
    """Patterns mean the same for a model and for the module that holds it together with its loss."""
    case = CASES[name]
    model = case.model()
    patterns = case.grouping(model)
    alone = groups_of(list(trainable(model)), patterns)
    wrapped = groups_of(list(trainable(LossInside(model, case.loss))), patterns)
    assert list(alone.values()) == list(wrapped.values())


@pytest.mark.parametrize("name", ["linear_3d", "tied_embedding_and_head", "conv2d", "encoder_layer_time_major"])
def test_the_training_step_itself(name):
    """The harness, with a backend that does not clip, gives what the oracle gives under a huge bound."""
    case = CASES[name]
    model, batch = case.model(), case.batch(5)
    plain = Case(case.build, case.inputs, case.targets, case.loss, name=name)  # no options: this backend takes none
    for place, reduction in (("outside", "mean"), ("inside", "sum"), ("inside_reduced", "mean")):
        released = reference_gradients(case, model, batch, max_grad_norm=1e30, loss_reduction=reduction)
        found = compiled_gradients(plain, model, batch, place, reduction, backend="aot_eager")
        assert max(relative_errors(found, released.gradients).values()) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_mix_samples(name):
    refused = REFUSED[name]
    assert mixes_samples(refused) == refused.mixes


# The oracle by hand: with loss x . w, the gradient of sample i is x_i itself


def dot_case() -> Case:
    return Case(
        build=lambda: Model(lambda m, x: m.first(x[:, :2]) + m.second(x[:, 2:]),
                            first=nn.Linear(2, 1, bias=False), second=nn.Linear(1, 1, bias=False)),
        inputs=lambda size: (torch.randn(size, 3),),
        targets=lambda size: torch.zeros(size),
        loss=lambda output, target: output[:, 0] + 0 * target,
        name="dot",
    )  # fmt: skip


def of_rows(*rows: list[float], **options):
    """The oracle on given per-sample gradients: two entries in first.weight and one in second.weight."""
    case = dot_case()
    batch = case.batch(len(rows)).map(lambda tensor: tensor)
    x = torch.tensor(rows).reshape(-1, 3)
    released = reference_gradients(
        case, case.model(), type(batch)((x,), {}, torch.zeros(len(rows)), len(rows)), **options
    )
    return released, torch.cat([released.gradients[f"{name}.weight"].flatten() for name in ("first", "second")])


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_hard_clipping_by_hand():
    released, total = of_rows([3.0, 4, 0], [0.3, 0, 0.4], max_grad_norm=1.0)
    close(released.norms, [[5.0], [0.5]])
    close(released.factors, [[0.2], [1.0]])
    close(total, [0.45, 0.4, 0.2])


def test_divisors_by_hand():
    rows = [3.0, 4, 0], [0.3, 0, 0.4]
    close(of_rows(*rows, loss_reduction="sum", expected_batch_size=9)[1], [0.9, 0.8, 0.4])
    close(of_rows(*rows, expected_batch_size=9)[1], [0.1, 0.8 / 9, 0.4 / 9])


def test_other_clip_functions_by_hand():
    rows = [3.0, 4, 0], [0.0, 0, 0]
    close(of_rows(*rows, clip_fn="automatic")[0].factors, [[1 / (5 + GAMMA)], [1 / GAMMA]])
    close(of_rows(*rows, clip_fn="normalize", max_grad_norm=10.0)[0].factors, [[2.0], [0.0]])


def test_groups_by_hand():
    released, total = of_rows([3.0, 4, 0.5], clipping="per_layer", max_grad_norm=sqrt(2.0))
    assert released.groups == ("first", "second")
    close(released.norms, [[5.0, 0.5]])
    close(total, [0.6, 0.8, 0.5])
    bounds = {"first*": 2.5, "*": 0.1}
    close(of_rows([3.0, 4, 0.5], clipping={"second*": "b", "*": "a"}, max_grad_norm=bounds)[1], [1.5, 2, 0.1])
    with pytest.raises(ValueError, match="several bounds"):
        of_rows([3.0, 4, 0.5], max_grad_norm=bounds)


def test_samples_that_are_not_finite_add_nothing():
    for bad in (nan, inf, -inf):
        released, total = of_rows([3.0, 4, 0], [bad, 1, 1])
        close(released.factors, [[0.2], [0.0]])
        close(total, [0.3, 0.4, 0])
    # by group: the sample still counts where its norm is finite
    close(of_rows([nan, 1, 0.5], clipping="per_layer")[1], [0, 0, 0.5])


def test_an_empty_batch_gives_zeros():
    close(of_rows()[1], [0.0, 0, 0])


def test_tied_parameters_belong_to_their_first_owner():
    model = TiedLanguageModel(5, 3)
    assert groups_of(list(trainable(model)), "per_layer") == {
        "tokens.weight": "tokens",
        "hidden.weight": "hidden",
        "hidden.bias": "hidden",
    }


def test_relative_errors_fall_back_on_the_whole_norm():
    expected = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([1e-12]).double()}
    got = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([5e-6])}
    assert relative_errors(got, expected)["b"] == pytest.approx(1e-6, rel=1e-3)
    assert relative_errors({"a": None, "b": None}, expected)["a"] == pytest.approx(1.0)


def test_cases_are_the_same_in_every_run():
    case = CASES["gpt"]
    one, two = case.model(), case.model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(case.batch(3).args[0], case.batch(3).args[0])
    assert not torch.equal(case.batch(3).args[0], case.batch(3, seed=1).args[0])
    copied = copy.deepcopy(one)
    assert copied.head.weight is copied.tokens.weight
