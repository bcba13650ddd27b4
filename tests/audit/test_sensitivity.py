"""The oracle finds each way in which one sample moves a sum too far, and none in a step that is right."""

import math

import pytest
import torch
from torch import nn

from audit.steps import BOUND, BROKEN, data, gradients, losses, mlp, norm, right, step
from flashdp_compile import OptionError, Refusal
from flashdp_compile.accounting.sampling import ADD_OR_REMOVE, REPLACE, ZERO_OUT
from flashdp_compile.audit import measure, sensitivity
from flashdp_compile.audit.oracle import SLACK
from flashdp_compile.kernels.catalogue import FAMILIES
from flashdp_compile.kernels.family import Family

EAGER = {"compiler": "eager", "max_grad_norm": BOUND}


def test_a_right_step_holds_and_reaches_its_bound():
    found = measure(step(mlp(), right), data(), bound=BOUND)
    assert found.holds and found.tested
    assert {m.adjacency for m in found.moves} == {ADD_OR_REMOVE, ZERO_OUT, REPLACE}
    assert len({m.sample for m in found.moves}) == 8 and len(found.moves) == 24


@pytest.mark.parametrize("mechanism", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_step_is_found(mechanism):
    found = measure(step(mlp(), mechanism), data(), bound=BOUND, samples=[0, 3, 7])
    assert not found.holds and "VIOLATED" in str(found)
    assert not found.worst.holds


def test_batch_statistics_are_found():
    """Each sample's gradient is clipped, but depends on the others."""
    x, y = data()
    far = (torch.full((1, 3), 50.0), torch.zeros(1, dtype=torch.int64))
    mixing = step(mlp(nn.BatchNorm1d(5)), right)
    found = measure(mixing, (x, y), bound=BOUND, others=far, adjacencies=[REPLACE])
    assert not found.holds
    assert measure(step(mlp(nn.LayerNorm(5)), right), (x, y), bound=BOUND, others=far, adjacencies=[REPLACE]).holds


def test_a_move_is_the_clipped_gradient_of_the_sample():
    """The compiled step against autograd in float64: what leaves with a sample is its own share."""
    model, batch = mlp(), data()
    found = sensitivity(model, batch, losses, options=EAGER, samples=[0, 5])
    exact = mlp().double()
    own = gradients(exact, (batch[0].double(), batch[1]), torch.ones(12))
    for move in found.moves:
        if move.adjacency == REPLACE:
            continue
        length = norm(own[move.sample])
        assert move.total == pytest.approx(min(length, BOUND), rel=3e-3)
        for name, c in move.parameters.items():
            expected = own[move.sample][name] * min(1.0, BOUND / length)
            assert c.norm == pytest.approx(float(expected.norm()), rel=3e-3)
            assert c.size == c.moved == expected.numel()
            assert float(expected[c.largest].abs()) == pytest.approx(float(expected.abs().max()), rel=1e-4)


@pytest.mark.parametrize(
    "options, bound",
    [
        ({"loss_reduction": "sum", "clipping": "per_layer", "clip_fn": "normalize"}, BOUND),
        ({"clipping": {"0.*": "low", "*": "high"}, "max_grad_norm": {"0.*": 0.03, "*": 0.04}}, 0.05),
        ({"noise_multiplier": 3.0, "noise_at": "step", "expected_batch_size": 8}, BOUND),
    ],
    ids=str,
)
def test_the_backend_holds_under_its_options(options, bound):
    found = sensitivity(mlp(), data(), losses, options={**EAGER, **options}, samples=[1, 7])
    assert found.holds and found.bound == pytest.approx(bound)
    assert found.tested and max(m.total for m in found.moves if m.adjacency == ADD_OR_REMOVE) <= bound * (1 + SLACK)


@pytest.fixture
def forget_kernels():
    """Which kernel an op takes is remembered by its arguments' sizes."""
    yield
    for family in FAMILIES.values():
        family._chosen.clear()


def test_a_kernel_that_computes_too_small_a_norm_is_found(monkeypatch, forget_kernels):
    """The proof of a graph cannot see it: it takes a kernel for its formula."""
    choose = Family._choose
    FAMILIES["gram_sqnorm"]._chosen.clear()

    def wrong(family, *args):
        kernel = choose(family, *args)
        return (lambda *a: 0.9 * kernel(*a)) if family.name == "gram_sqnorm" else kernel

    monkeypatch.setattr(Family, "_choose", wrong)
    found = sensitivity(mlp(), data(), losses, options=EAGER, samples=[0])
    assert not found.holds and found.worst.total > 1.02 * found.bound


def test_a_scalar_loss_has_no_weights_and_the_model_of_the_user_is_left_alone():
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    model[0].weight.grad = torch.ones(5, 3)
    found = sensitivity(model, data(), lambda m, b: losses(m, b).mean(), options=EAGER, samples=[2])
    assert found.holds and {m.adjacency for m in found.moves} == {ADD_OR_REMOVE, REPLACE}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones(5, 3)) and model[2].weight.grad is None


def test_only_what_a_sample_uses_moves():
    model = nn.EmbeddingBag(6, 2, mode="sum")
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    found = sensitivity(model, ids, lambda m, b: m(b).sum(1), options=EAGER, samples=[1])
    move = next(m for m in found.moves if m.adjacency == ADD_OR_REMOVE)
    assert move.parameters["weight"].moved == 4 and move.parameters["weight"].largest[0] in (2, 3)
    assert found.moved == ("weight",)


def test_the_printed_table():
    text = str(measure(step(mlp(), right), data(), bound=BOUND, samples=[0]))
    assert "one sample replaced by another" in text and "2.0039   holds" in text
    assert "0.weight" in text and "15 of 15" in text and text.endswith("HOLDS for 1 samples")
    loose = str(measure(step(mlp(), right), data(), bound=100 * BOUND, samples=[0]))
    assert loose.endswith("none came near C: take a smaller max_grad_norm to see it clip")


def test_a_sum_that_is_not_finite_is_a_violation():
    def nan_for_sample_3(own):
        return {name: t * (math.nan if len(own) == 11 else 1.0) for name, t in right(own).items()}

    found = measure(step(mlp(), nan_for_sample_3), data(), bound=BOUND, samples=[3])
    assert not found.holds and found.worst.adjacency == ADD_OR_REMOVE


def test_what_cannot_be_audited_is_said():
    with pytest.raises(OptionError, match="two steps on the same batch differ .*dropout"):
        sensitivity(mlp(nn.Dropout(0.5)), data(), losses, options=EAGER)
    with pytest.raises(Refusal, match="batch"):
        sensitivity(mlp(nn.BatchNorm1d(5)), data(), losses, options=EAGER)
    for samples in ([], [12], [-1]):
        with pytest.raises(OptionError, match="at least one, each from 0 to 11"):
            measure(step(mlp(), right), data(), bound=BOUND, samples=samples)
    with pytest.raises(OptionError, match="batch holds tensors of"):
        measure(step(mlp(), right), (torch.ones(3, 3), torch.ones(2)), bound=BOUND)
    with pytest.raises(OptionError, match="adjacencies='swap'"):
        measure(step(mlp(), right), data(), bound=BOUND, adjacencies=["swap"])
    with pytest.raises(OptionError, match="batch of one sample"):
        measure(step(mlp(), right), data(1), bound=BOUND, adjacencies=[REPLACE])
    with pytest.raises(OptionError, match="audit the unscaled loss"):
        scaler = torch.amp.GradScaler("cpu", growth_interval=2**31 - 1)
        sensitivity(mlp(), data(), losses, options={**EAGER, "grad_scaler": scaler})
    with pytest.raises(OptionError, match=r"loss gives shape \(12, 2\)"):
        sensitivity(mlp(), data(), lambda m, b: m(b[0]), options=EAGER)
