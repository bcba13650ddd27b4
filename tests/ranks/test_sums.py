"""The clipped sums of several ranks are those that one rank would have made of all their samples."""

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from engine.runs import clipped_sum, copies, engine, mlp, moved, samples
from flashdp_compile.runtime.watch import find
from ranks.runs import WAYS, Heads, Images, Net, backward, close, expected, same, setup, share, take_steps


def one_step(rank, size, cases):
    """What two steps have moved, for each (way, root, clipping)."""
    found = []
    for way, root, clipping in cases:
        its, model, called, optimizer = setup(way, root, clipping=clipping)
        steps = []
        for _ in range(2):
            start = copies(model)
            take_steps(its, called, optimizer, [share(rank, size)])
            steps.append((start, moved(model, start)))
        assert its.steps_done == 2
        found.append(steps)
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_sums_of_all_ranks(pool, size, way):
    pairs = [(mlp, "flat"), (Net, "per_layer")] + ([(mlp, "per_layer"), (Net, "flat")] if size == 2 else [])
    cases = [(way, root, clipping) for root, clipping in pairs]
    ranks = pool.run(size, one_step, cases)
    for number, (_, root, clipping) in enumerate(cases):
        for start, found in ranks[0][number]:
            model = root()
            with torch.no_grad():
                for p, value in zip(model.parameters(), start, strict=True):
                    p.copy_(value)
            assert close(found, expected(model, samples(), clipping)), (root.__name__, clipping)
        for other in ranks[1:]:
            assert all(same(a[1], b[1]) for a, b in zip(ranks[0][number], other[number], strict=True))


def accumulated(rank, size, how):
    """One step of two micro-batches on each rank."""
    its, model, called, optimizer = setup("inside", micro_batches=2)
    start = copies(model)
    for number, x in enumerate(share(rank, size).chunk(2)):
        with called.no_sync() if how == "no_sync" and number == 0 else contextlib.nullcontext():
            backward(called, x)
        if how == "steps" or number == 1:
            optimizer.step()
            assert its.stepped == (number == 1)
    return moved(model, start)


@pytest.mark.parametrize("how", ["no_sync", "steps", "sums"])
def test_micro_batches(pool, how):
    for found in pool.run(2, accumulated, how):
        assert close(found, expected(mlp(), samples()))


def uneven(rank, size, sizes, way):
    its, model, called, optimizer = setup(way)
    start = copies(model)
    take_steps(its, called, optimizer, [samples().split(sizes)[rank]])
    return moved(model, start)


@pytest.mark.parametrize(
    ("sizes", "way"),
    [*((sizes, way) for sizes in ([7, 1], [0, 8], [8, 0]) for way in WAYS), ([0, 3, 0, 5], "inside")],
    ids=str,
)
def test_parts_of_any_size(pool, sizes, way):
    for found in pool.run(len(sizes), uneven, sizes, way):
        assert close(found, expected(mlp(), samples()))


def laid_out(rank, size, roots, sizes):
    """For each root what a step has moved, and the strides of the sum that this rank has had."""
    found = []
    for root in roots:
        its, model, called, optimizer = setup("inside", root)
        start = copies(model)
        backward(called, samples().split(sizes)[rank])
        strides = find(next(model.parameters())).held.total.stride()
        optimizer.step()
        found.append((moved(model, start), strides))
    return found


@pytest.mark.parametrize("sizes", [[1, 7], [8, 0]], ids=str)
def test_sums_that_ranks_have_laid_out_in_other_orders(pool, sizes):
    roots = Heads, Images
    one, other = pool.run(2, laid_out, roots, sizes)
    for root, (found, strides), (its, others) in zip(roots, one, other, strict=True):
        assert strides != others or 1 not in sizes, "the test is of sums that lie otherwise"
        assert close(found, clipped_sum(root(), samples())) and same(found, its)


def settings_of_ddp(rank, size):
    """What changes how DistributedDataParallel keeps and counts gradients."""
    its, model = engine(), mlp()
    called = DistributedDataParallel(
        its.compile(model), gradient_as_bucket_view=True, find_unused_parameters=True, bucket_cap_mb=1
    )
    optimizer, start = its.attach(torch.optim.SGD(model.parameters(), lr=1.0)), copies(model)
    take_steps(its, called, optimizer, [share(rank, size)])
    return moved(model, start)


def test_other_settings_of_ddp(pool):
    for found in pool.run(2, settings_of_ddp):
        assert close(found, expected(mlp(), samples()))


def averaged(rank, size, way):
    """A copy of what is called, for averages of weights, is evaluated beside it."""
    its, model, called, optimizer = setup(way)
    average = AveragedModel(called, avg_fn=lambda mean, now, count: now)
    found = []
    for _ in range(2):
        take_steps(its, called, optimizer, [share(rank, size)])
        average.update_parameters(called)
        with torch.no_grad():
            found.append(torch.allclose(average(samples()), called(samples())))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_averages_of_weights(pool, way):
    assert pool.run(2, averaged, way) == [[True, True]] * 2


def model_of_buckets(rank, size, way):
    """A model that dynamo would cut at the buckets of DistributedDataParallel."""
    its, model, called, optimizer = setup(way, lambda: mlp(300_000))
    start = copies(model)
    take_steps(its, called, optimizer, [share(rank, size)])
    return moved(model, start)[3]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", WAYS[:2])
def test_a_model_larger_than_a_bucket(pool, size, way):
    one, *others = pool.run(size, model_of_buckets, way)
    assert close([one], expected(mlp(300_000), samples())[3:])
    assert all(torch.equal(one, other) for other in others)


def two_optimizers(rank, size):
    its, model = engine(noise_multiplier=1.0, seed=3), mlp()
    called = DistributedDataParallel(its.compile(model))
    both = [its.attach(torch.optim.SGD(layer.parameters(), lr=1.0)) for layer in (model[0], model[2])]
    for _ in range(2):
        backward(called, share(rank, size))
        for optimizer in both:
            optimizer.step()
    return its.steps_done, copies(model)


def test_optimizers_that_share_a_step(pool):
    ((done, alone),), ranks = pool.run(1, two_optimizers), pool.run(2, two_optimizers)
    assert done == 2
    for count, found in ranks:
        assert count == 2 and close(found, alone, 1e-5)
