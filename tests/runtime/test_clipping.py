"""The operator around kernels.clip: the scale of the loss, the divisor, and the count of dropped samples."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flashdp_compile.kernels.clip import FUNCTIONS, release_weights
from flashdp_compile.runtime import clipping

clip_factors = torch.ops.flashdp.clip_factors


@pytest.fixture(autouse=True)
def from_zero():
    clipping.reset_nonfinite()


def test_sum():
    weights = clip_factors(torch.tensor([0.25, 4.0, 16.0]), 1.0, "hard", False, 100)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5, 0.25]), atol=1e-6, rtol=0)


def test_mean_divides_by_the_expected_batch_size():
    """A sample's own norm is B times the square root of what the graph of a mean gives."""
    norms = torch.tensor([0.5, 2.0, 4.0])
    weights = clip_factors((norms / 3).square(), 1.0, "hard", True, 10)
    clipped = weights * norms / 3
    torch.testing.assert_close(clipped, torch.tensor([0.5, 1.0, 1.0]) / 10, atol=1e-6, rtol=0)


def test_mean_divides_by_the_batch_when_nothing_is_expected():
    norms = torch.tensor([0.5, 2.0, 4.0, 0.0])
    clipped = clip_factors((norms / 4).square(), 1.0, "hard", True, None) * norms / 4
    torch.testing.assert_close(clipped, torch.tensor([0.5, 1.0, 1.0, 0.0]) / 4, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mean", [True, False])
def test_empty_batch(mean):
    weights = clip_factors(torch.zeros(0), 1.0, "hard", mean, None)
    assert weights.shape == (0,) and weights.dtype == torch.float32
    assert clipping.nonfinite_samples() == 0


def test_nonfinite_samples_are_dropped_and_counted():
    sqnorm = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    weights = clip_factors(sqnorm, 1.0, "hard", False, None)
    assert weights[1:3].tolist() == [0.0, 0.0] and weights[0] > 0.99
    assert clipping.nonfinite_samples() == 2
    clip_factors(sqnorm, 1.0, "automatic", False, None)
    assert clipping.nonfinite_samples() == 4
    clipping.reset_nonfinite()
    assert clipping.nonfinite_samples() == 0


def test_one_call_counts_for_all_groups():
    nan, inf = float("nan"), float("inf")
    own = torch.tensor([1.0, nan, 1.0, 1.0])
    others = torch.tensor([[nan, 1.0], [inf, nan], [1.0, 1.0], [1.0, -1e-9]])  # a negative estimate is no norm
    weights = clip_factors(own, 1.0, "hard", False, None, True, others)
    assert weights[[0, 2, 3]].gt(0.99).all() and weights[1] == 0, "a group is clipped by its own norms alone"
    assert clipping.nonfinite_samples() == 3
    assert torch.equal(clip_factors(own, 1.0, "hard", False, None, False), weights)
    assert clipping.nonfinite_samples() == 3


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a_negative_estimate_drops_its_sample(fn):
    """Rounding has gone beyond what the guard allows for, so the estimate bounds nothing."""
    norms = torch.tensor([-1.0, -1e-30, 4.0])
    for weights in (clip_factors(norms, 1.0, fn, False, None), release_weights(norms, 1.0, fn, False, None)):
        assert weights[:2].eq(0).all() and weights[2] > 0
    assert clipping.nonfinite_samples() == 2


def test_float64_norms_give_float32_weights():
    assert clip_factors(torch.ones(2, dtype=torch.float64), 1.0, "hard", False, None).dtype == torch.float32


def test_any_batch_size_in_one_graph():
    """Also unbacked: a size that was not seen when the graph was traced."""

    def chosen(values, mask):
        return clip_factors(values[mask], 1.0, "hard", True, 4)

    values, mask = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([True, False, True])
    graph = make_fx(chosen, tracing_mode="symbolic")(values, mask)
    for kept in ([True, True, True], [False, False, False], [True, False, False]):
        chosen_now = torch.tensor(kept)
        torch.testing.assert_close(graph(values, chosen_now), chosen(values, chosen_now))


def test_the_operator_is_declared_correctly():
    for arguments in [
        (torch.ones(3), 1.0, "hard", True, 4),
        (torch.ones(3), 1.0, "normalize", False, None),
        (torch.ones(3), 1.0, "normalize", False, None, True, torch.ones(3, 2)),
    ]:
        torch.library.opcheck(clip_factors.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 3])
def test_captured_counts_go_on(groups):
    """A capture does not allow to wait for the device, so none of this waits."""
    clipping.prepare("cuda")
    sqnorm = torch.tensor([1.0, float("nan")], device="cuda")
    others = None if groups == 1 else torch.stack([sqnorm] * (groups - 1), 1)

    def step():
        clip_factors(sqnorm, 1.0, "hard", False, None, True, others)
        for _ in range(groups - 1):
            clip_factors(sqnorm, 1.0, "hard", False, None, False)

    step()  # compiles the kernels
    clipping.reset_nonfinite()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    assert clipping.nonfinite_samples() == 3
