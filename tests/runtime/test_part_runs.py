"""One bound for all parts of a model: what each may add of a sample, whatever the first of two backward runs finds."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from flashdp_compile.errors import InternalError, Refusal
from flashdp_compile.kernels.clip import release_weights
from flashdp_compile.runtime.part_runs import PartRuns, share_bound

BOUND = 0.7
norms = st.floats(0, 2.0**60, width=32, allow_nan=False)


def weights(first, second, fn="hard"):
    """[parts, B] of the second run, from the norms [parts, B] that each run finds."""
    runs, found = PartRuns(shared=True), []

    def backward(keep):
        for runs.running, sizes in reversed([*enumerate(first if keep else second)]):
            sqnorm = share_bound(torch.tensor(sizes, dtype=torch.float32).square(), runs.place)
            if not keep:
                found.append(release_weights(sqnorm, BOUND, fn, False, None))

    runs.twice(backward, lambda: None)
    return torch.stack(found[::-1]).double()


@pytest.mark.parametrize("fn", ["hard", "automatic", "normalize"])
def test_parts_are_clipped_as_one(fn):
    found = torch.rand(3, 5) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    whole = release_weights(found.square().sum(0), BOUND, fn, False, None).double()
    torch.testing.assert_close(weights(found.tolist(), found.tolist(), fn), whole.expand(3, 5), rtol=1e-6, atol=0)


@given(st.lists(st.tuples(norms, norms), min_size=1, max_size=6), st.sampled_from(["hard", "automatic", "normalize"]))
def test_no_sample_adds_more_than_the_bound(pairs, fn):
    """Nothing rests on both runs finding the same."""
    first, second = [[a] for a, _ in pairs], [[b] for _, b in pairs]
    added = weights(first, second, fn) * torch.tensor(second, dtype=torch.float32).double()
    assert float(added.square().sum().sqrt()) <= BOUND * (1 + 2**-22)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("run", [0, 1])
def test_a_sample_without_a_norm_is_left_out_of_all_parts(bad, run):
    found = torch.ones(2, 3, 4)
    found[run, 1, 2] = bad
    got = weights(*found.tolist())
    left_out = torch.zeros(3, 4, dtype=torch.bool)
    left_out[:, 2] = True if run == 0 else torch.tensor([False, True, False])
    assert torch.equal(got == 0, left_out)


def test_a_sample_without_a_gradient():
    assert torch.equal(weights([[0.0], [0.0]], [[0.0], [0.0]]), torch.ones(2, 1).double())


def test_shares_are_of_the_backward_that_runs():
    runs = PartRuns(shared=True)
    runs.running = 0
    with pytest.raises(InternalError, match="its share of the clipping bound is not known"):
        share_bound(torch.ones(2), runs.place)
    with pytest.raises(ZeroDivisionError):
        runs.twice(lambda keep: 1 / 0, lambda: None)
    assert not runs.measuring
    with pytest.raises(InternalError):
        share_bound(torch.ones(2), runs.place)


def test_parts_of_other_batches():
    with pytest.raises(Refusal, match=r"batches of \[1, 2\] samples"):
        weights([[1.0], [1.0, 1.0]], [[1.0], [1.0, 1.0]])
