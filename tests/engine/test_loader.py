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
    refused(optimizer, "another backward has used these samples already")
    assert its.steps_done == 1


def test_one_draw_is_one_step_of_whatever_model():
    """Two releases of one draw are not two draws: amplification counts once for both."""
    its, model, compiled, optimizer = run(noise_multiplier=1.0)
    other = mlp()
    second, with_it = its.compile(other), its.attach(torch.optim.SGD(other.parameters(), lr=1.0))
    (x,) = next(iter(its.data_loader(data())))
    backward(compiled, x)
    optimizer.step()
    backward(second, x)
    refused(with_it, "another backward has used these samples already")


def test_a_batch_that_is_used_twice_or_not_at_all():
    its, model, compiled, optimizer = run(expected_batch_size=30)
    batches = iter(its.data_loader(data(), physical_batch_size=4))
    (x,) = next(batches)
    backward(compiled, x)
    backward(compiled, x)
    refused(optimizer, "holds 2 backward passes .* has handed out 1 micro-batch for")
    next(batches)
    (x,) = next(batches)
    backward(compiled, x)
    refused(optimizer, "holds 1 backward passes .* has handed out 3 micro-batches for")


def test_the_first_batch_twice_and_the_second_never():
    its, model, compiled, optimizer = run(expected_batch_size=30)
    batches = iter(its.data_loader(data(), physical_batch_size=4))
    (x,) = next(batches)
    backward(compiled, x)
    optimizer.step()
    lost = compiled(x)
    next(batches)
    lost.square().sum().backward()
    refused(optimizer, "holds 2 backward passes")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("keep", [False, True])
def test_a_loop_that_is_left_in_the_middle_begins_anew(keep, workers):
    """What it held is dropped: the logical batch is drawn anew, and may hold the same samples again."""
    its, model, compiled, optimizer = run(expected_batch_size=30)
    loader = its.data_loader(data(), physical_batch_size=20, num_workers=workers)
    for (x,) in loader:
        backward(compiled, x)
        if not keep:
            optimizer.step()
        if not loader.last:
            break
    assert its.steps_done == 0
    start, used = copies(model), []
    for (x,) in loader:
        backward(compiled, x)
        optimizer.step()
        used.append(x)
        if its.stepped:
            break
    for found, truth in zip(moved(model, start), clipped_sum(model_at(model, start), torch.cat(used)), strict=True):
        assert (found * 30 / LOGICAL - truth).norm() <= 1e-5 * truth.norm() + 1e-7


def test_a_look_at_the_first_batch_costs_nothing():
    its, model, compiled, optimizer = run()
    loader = its.data_loader(data())
    next(iter(loader))
    for number, (x,) in enumerate(loader):
        if number == 3:
            break
        optimizer.zero_grad()
        backward(compiled, x)
        optimizer.step()
    for (x,) in loader:
        optimizer.zero_grad()
        backward(compiled, x)
        optimizer.step()
    assert its.steps_done + 2 == its.plan.steps, "the first look, and the batch that the loop was left with"


def test_an_optimizer_that_comes_late_or_steps_now_and_then():
    its, model, compiled, optimizer = run()
    late = None
    for number, (x,) in enumerate(its.data_loader(data())):
        model.zero_grad()
        if number == 2:
            late = its.attach(torch.optim.SGD(mlp().parameters(), lr=1.0))
        backward(compiled, x)
        if number % 2:
            optimizer.step()
            assert its.stepped
        else:
            its._steps._attached[optimizer].clear()
    assert its.steps_done == 3 and late is not None


def test_a_step_that_was_refused_spoils_no_other():
    its, model, compiled, optimizer = run()
    for number, (x,) in enumerate(its.data_loader(data())):
        model.zero_grad()
        backward(model if number == 1 else compiled, x)
        if number == 1:
            refused(optimizer, "not made by a backward that flashdp compiled")
        else:
            optimizer.step()
            assert its.stepped
    assert its.steps_done == 5


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
    refused(optimizer, "holds 1 backward passes .* has handed out 3 micro-batches for")


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


def test_a_second_iteration_of_a_finished_run_says_so(caplog):
    its, model, compiled, optimizer = run()
    loader = its.data_loader(data())
    for (x,) in loader:
        model.zero_grad()
        backward(compiled, x)
        optimizer.step()
    assert "nothing left" not in caplog.text
    assert list(loader) == [] and "one iteration of it is the whole run" in caplog.text
