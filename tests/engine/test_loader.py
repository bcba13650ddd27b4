"""The whole loop: batches of any number of micro-batches, one release for each logical batch, the right samples."""

import pytest
import torch
from torch.utils.data import TensorDataset

from engine.runs import BOUND, clipped_sum, copies, mlp, moved
from flashdp_compile import OptionError, PrivacyEngine, UnprotectedGradientError, accounting

ROWS, LOGICAL = 40, 8


def data():
    return TensorDataset(torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(2)))


def run(**settings):
    own = {
        "target_delta": 1e-3,
        "sample_size": ROWS,
        "expected_batch_size": LOGICAL,
        "noise_multiplier": 0.0,
        "steps": 6,
        "max_grad_norm": BOUND,
        "options": {"compiler": "eager"},
    }
    its, model = PrivacyEngine(**{**own, **settings}), mlp()
    return its, model, its.compile(model), its.attach(torch.optim.SGD(model.parameters(), lr=1.0))


def backward(compiled, x, weight=None):
    losses = compiled(x).square().sum(1)
    (losses if weight is None else losses * weight).sum().div(max(len(x), 1)).backward()


@pytest.mark.parametrize("physical", [None, 1, 3, 5])
def test_every_logical_batch_is_one_release_of_its_samples(physical):
    its, model, compiled, optimizer = run()
    rows, start, steps = [], copies(model), 0
    for (x,) in its.data_loader(data(), physical_batch_size=physical):
        optimizer.zero_grad()
        backward(compiled, x)
        optimizer.step()
        rows.append(x)
        if its.stepped:
            logical = torch.cat(rows)
            expected = clipped_sum(model_at(model, start), logical)
            for found, truth in zip(moved(model, start), expected, strict=True):
                assert (found - truth).norm() <= 1e-5 * truth.norm() + 1e-7
            rows, start, steps = [], copies(model), steps + 1
            assert len(logical) == 0 or len(torch.unique(logical, dim=0)) == len(logical)
    assert steps == its.steps_done == 6 and not rows


def model_at(model, values):
    at = mlp()
    with torch.no_grad():
        for p, v in zip(at.parameters(), values, strict=True):
            p.copy_(v)
    return at


def final(steps=6, **settings):
    """Parameters at the end of a seeded run."""
    its, model, compiled, optimizer = run(seed=3, steps=steps, **{k: v for k, v in settings.items() if k != "loader"})
    for batch in its.data_loader(data(), **settings["loader"]):
        (x,), weight = batch if settings["loader"].get("pad") else (batch, None)
        optimizer.zero_grad()
        backward(compiled, x, weight)
        optimizer.step()
    return copies(model)


@pytest.mark.parametrize(
    "loader",
    [{"physical_batch_size": 3}, {"physical_batch_size": 3, "pad": True}, {"physical_batch_size": 40}],
    ids=str,
)
def test_padded_and_split_runs_end_where_the_plain_one_does(loader):
    for found, truth in zip(final(loader=loader), final(loader={}), strict=True):
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_a_resumed_run_draws_what_an_unbroken_one_draws():
    whole = final(loader={"physical_batch_size": 5})
    its, model, compiled, optimizer = run(seed=3)
    for (x,) in its.data_loader(data(), physical_batch_size=5):
        optimizer.zero_grad()
        backward(compiled, x)
        optimizer.step()
        if its.steps_done == 2:
            break
    saved, parameters = its.state_dict(), model.state_dict()
    its, model, compiled, optimizer = run(seed=3)
    model.load_state_dict(parameters)
    loader = its.data_loader(data(), physical_batch_size=5)
    its.load_state_dict(saved)
    for (x,) in loader:
        optimizer.zero_grad()
        backward(compiled, x)
        optimizer.step()
    assert its.steps_done == 6
    for found, truth in zip(copies(model), whole, strict=True):
        assert torch.allclose(found, truth, rtol=1e-6)


def test_logical_batches_without_samples_are_steps():
    """Each costs what others cost, and moves nothing but by its noise."""
    its, model, compiled, optimizer = run(expected_batch_size=1, steps=12, seed=1)
    empty = 0
    for (x,) in its.data_loader(data()):
        start = copies(model)
        optimizer.zero_grad()
        backward(compiled, x)
        optimizer.step()
        empty += len(x) == 0
        assert (len(x) == 0) == all(torch.equal(a, torch.zeros_like(a)) for a in moved(model, start))
    assert its.steps_done == 12 and empty > 1


def refused(optimizer, text):
    with pytest.raises(UnprotectedGradientError, match=text):
        optimizer.step()


def test_other_samples_than_those_of_the_loader():
    its, model, compiled, optimizer = run()
    loader = its.data_loader(data())
    backward(compiled, torch.randn(4, 3))
    refused(optimizer, "has handed out 0 micro-batches")
    (x,) = next(iter(loader))
    backward(compiled, x)
    optimizer.step()
    optimizer.zero_grad()
    backward(compiled, torch.randn(4, 3))
    refused(optimizer, "has handed out 0 micro-batches")
    assert its.steps_done == 1


def test_a_batch_that_is_used_twice_or_not_at_all():
    its, model, compiled, optimizer = run(expected_batch_size=30)
    batches = iter(its.data_loader(data(), physical_batch_size=4))
    (x,) = next(batches)
    backward(compiled, x)
    backward(compiled, x)
    refused(optimizer, "hold 2 backward passes, but the loader has handed out 1 micro-batch for")
    next(batches)
    (x,) = next(batches)
    backward(compiled, x)
    refused(optimizer, "hold 1 backward passes, but the loader has handed out 2 micro-batches for")


def test_a_loop_that_reads_ahead():
    """Batches are taken one before they are used: the engine goes by the order of the backward passes."""
    its, model, compiled, optimizer = run(steps=8)
    batches = iter(its.data_loader(data(), physical_batch_size=3, read_ahead=1))
    logical, start, steps = [], copies(model), 0
    ahead = next(batches)
    while ahead is not None:
        (x,), ahead = ahead, next(batches, None)
        optimizer.zero_grad()
        backward(compiled, x)
        optimizer.step()
        logical.append(x)
        if its.stepped:
            expected = clipped_sum(model_at(model, start), torch.cat(logical))
            for found, truth in zip(moved(model, start), expected, strict=True):
                assert (found - truth).norm() <= 1e-5 * truth.norm() + 1e-7
            logical, start, steps = [], copies(model), steps + 1
    assert steps == its.steps_done == 8 and not logical


def test_a_batch_that_is_left_out_by_a_loop_that_reads_ahead():
    its, model, compiled, optimizer = run(expected_batch_size=30)
    batches = iter(its.data_loader(data(), physical_batch_size=4, read_ahead=1))
    next(batches), next(batches)
    (x,) = next(batches)
    backward(compiled, x)
    refused(optimizer, "hold 1 backward passes, but the loader has handed out 2 micro-batches for")
    (x,) = next(batches)
    backward(compiled, x)  # and it begins anew
    optimizer.step()
    assert its.steps_done == 0 and not its.stepped


def test_what_the_loader_must_have():
    its, *_ = run()
    with pytest.raises(OptionError, match="dataset has 40 rows, but sample_size=50"):
        run(sample_size=50)[0].data_loader(data())
    with pytest.raises(OptionError, match="sampling is given"):
        run(sampling=accounting.Poisson(0.2))[0].data_loader(data())
    with pytest.raises(OptionError, match="shuffle"):
        its.data_loader(data(), shuffle=True)


def test_a_cap():
    its, model, compiled, optimizer = run(cap=5, expected_batch_size=20, steps=20)
    assert its.plan.sampling == accounting.TruncatedPoisson(0.5, 5, 40)
    sizes = {len(x) for (x,) in its.data_loader(data())}
    assert max(sizes) == 5
