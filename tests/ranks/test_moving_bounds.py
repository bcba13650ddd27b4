"""Clipping bounds that move, in parts of a sharded model: each group's own, by the votes of all ranks.

Parts of one class share their code: two blocks have the same groups by name, and other bounds.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.runs import BATCH, engine, samples
from flashdp_compile import Quantile
from flashdp_compile.engine import bounds as engine_bounds
from flashdp_compile.runtime.bounds import BoundScales
from ranks.runs import backward, close, same, share, text_of
from ranks.sharded import Block, Net, full, setup, shard, steps

LAYER, BLOCK = "per_layer", "per_block"
PARTS = ("first", "blocks.0", "blocks.1", "head")
LAYERS = ("first", "head", *(f"blocks.{k}.{layer}" for k in (0, 1) for layer in ("up", "down")))
BY_HAND = {f"{part}.*": part for part in PARTS}  # what BLOCK is, for a whole model
HOW = Quantile(target=0.5, rate=0.6)
START = 0.4  # of all groups together: some samples are within their bounds, and some are not
SEEDED = {"noise_multiplier": 0.8, "seed": 7}


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Halfway(Net):
    """A block that is frozen in one layer, and a part that is frozen, with gradients on their way through it."""

    def __init__(self):
        super().__init__()
        self.blocks.append(Block())
        self.blocks[0].up.requires_grad_(False)
        self.blocks[1].requires_grad_(False)

    def forward(self, x):
        for block in (self.first, *self.blocks, self.head):
            x = block(x)
        return x


def checkpointed():
    net = Net()
    for block in net.blocks:
        block.__class__ = Checkpointed
    return net


NETS = {"plain": Net, "halfway": Halfway, "checkpointed": checkpointed}


def prepared(clipping, net="plain", way="parts", **settings):
    kind = BY_HAND if way is None and clipping == BLOCK else clipping
    settings = {"bounds": HOW, "max_grad_norm": START, **settings}
    return setup(NETS[net](), way, lr=0.2, clipping=kind, **settings)


def run(rank, size, cases, count=4):
    """The bounds behind each step, and the parameters at the end, for each (clipping, other arguments)."""
    found = []
    for clipping, settings in cases:
        its, net, called, optimizer = prepared(clipping, **settings)
        assert its.max_grad_norm() == {}
        # with noise all rows are on one rank: sums are rounded alike
        rows = share(rank, size) if its.seed is None else samples() if rank == size - 1 else samples(0)
        bounds = []
        for _ in range(count):
            steps(called, optimizer, rows, 1)
            bounds.append(its.max_grad_norm())
        found.append((bounds, full(net)))
    return found


def told_alike(found, wanted):
    return all(one == pytest.approx(other, rel=1e-6) for one, other in zip(found, wanted, strict=True))


CASES = [(LAYER, {}), (BLOCK, {}), (LAYER, {"net": "halfway"})]
MORE = [*CASES, (LAYER, {"net": "checkpointed"}), (LAYER, {"way": "whole"})]  # which are as the first


def test_a_run_is_that_of_a_whole_model(pool):
    whole = run(0, 1, [(clipping, {**settings, "way": None}) for clipping, settings in CASES])
    for (bounds, _), names in zip(whole, (LAYERS, PARTS), strict=False):
        assert bounds[-1].keys() == set(names)
        assert len({round(value, 5) for value in bounds[-1].values()}) == len(names), "each group has its own"
        moves = [new[name] / old[name] for old, new in itertools.pairwise(bounds) for name in names]
        assert min(moves) < 0.95 and max(moves) > 1.05, "they move up and down"
    expected = [*whole, whole[0], whole[0]]
    for rank in (*pool.run(1, run, MORE[:1]), *pool.run(2, run, MORE)):
        for case, (bounds, values), (wanted, weights) in zip(MORE, rank, expected, strict=False):
            assert told_alike(bounds, wanted), case
            assert close(values, weights, 1e-6), case


@pytest.mark.parametrize(("size", "way"), [(2, "parts"), (2, "blocks"), (4, "hybrid")])
def test_a_seed_gives_the_run_of_one_rank(size, way, pool):
    """Votes have noise of their own, which all ranks draw alike."""
    cases = [(clipping, {"way": "parts", **SEEDED}) for clipping in (LAYER, BLOCK)]
    (alone,) = pool.run(1, run, cases, 3)
    others = [(clipping, {**settings, "way": way}) for clipping, settings in cases]
    for rank in pool.run(size, run, others, 3):
        for (bounds, values), (wanted, weights) in zip(rank, alone, strict=True):
            assert bounds == wanted and same(values, weights)


def scheduled(rank, size, way, clipping):
    """As `run`, along a schedule, in micro-batches of which some are empty."""
    its, net, called, optimizer = prepared(clipping, way=way, bounds=lambda step: 2.0 * 0.25**step, micro_batches=2)
    found = []
    for _ in range(3):
        for rows in cut(rank, size):
            optimizer.zero_grad()
            backward(called, rows)
            optimizer.step()
        assert its.stepped
        found.append(its.max_grad_norm())
    return found, full(net)


def cut(rank, size):
    """The two micro-batches of a rank."""
    sizes = [[3, 0], [1, 4]] if size == 2 else [[8, 0]]
    rows = iter(samples().split([count for one in sizes for count in one]))
    return [[next(rows), next(rows)] for _ in sizes][rank]


@pytest.mark.parametrize("clipping", [LAYER, BLOCK])
def test_a_schedule(clipping, pool):
    wanted, weights = scheduled(0, 1, None, clipping)
    for bounds, values in pool.run(2, scheduled, "parts", clipping):
        assert told_alike(bounds, wanted) and close(values, weights, 1e-6)
        names = LAYERS if clipping == LAYER else PARTS
        assert bounds[1] == pytest.approx(dict.fromkeys(names, START / math.sqrt(len(names)) * 2.0 * 0.25**2))


def voted(rank, size, clipping, counts):
    """By the number of samples: log(bound) behind a step over theirs, and for how many groups votes had noise."""
    found, deviation = {}, engine_bounds.deviation_of_votes
    for count in counts:
        its, net, called, optimizer = prepared(clipping, micro_batches=2)
        accounted = []

        def noted(sigma, share, groups, accounted=accounted):
            accounted.append(groups)
            return deviation(sigma, share, groups)

        with mock.patch.object(engine_bounds, "deviation_of_votes", noted):
            for rows in cut(rank, size):
                rows = rows[rows.ne(samples()[-1]).any(1)] if count < BATCH else rows
                # the mean over 8, also of fewer rows
                (called(rows).square().sum() / max(len(rows), 1)).backward()
                optimizer.step()
        assert its.stepped
        found[count] = {name: math.log(bound) for name, bound in its.max_grad_norm().items()}, accounted
    return found


def norms(net, names, rows):
    """{group: [B]} of each sample's own gradient, in float64."""
    exact, found = copy.deepcopy(net).double(), {name: [] for name in names}
    for row in rows.double().split(1):
        exact.zero_grad()
        exact(row).square().sum().backward()
        for name in names:
            grads = [p.grad.flatten() for p in exact.get_submodule(name).parameters()]
            found[name].append(float(torch.cat(grads).norm()))
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.mark.parametrize(("clipping", "names"), [(LAYER, LAYERS), (BLOCK, PARTS)], ids=[LAYER, BLOCK])
def test_each_sample_has_one_vote_in_each_group(clipping, names, pool):
    """Of all ranks, parts and micro-batches together."""
    ranks, bound = pool.run(2, voted, clipping, (BATCH, BATCH - 1)), START / math.sqrt(len(names))
    for found in ranks:
        assert all(accounted == [len(names)] for _, accounted in found.values())
        for count, (logs, _) in found.items():
            for name, sizes in norms(Net(), names, samples()[:count]).items():
                votes = float(torch.where(sizes <= bound, 0.5, -0.5).sum())
                assert logs[name] == pytest.approx(math.log(bound) - HOW.rate * votes / BATCH, abs=1e-6), name
        one, other = (logs for logs, _ in found.values())
        for name in names:
            assert abs(one[name] - other[name]) == pytest.approx(HOW.rate / 2 / BATCH, rel=1e-4)


def two_optimizers(rank, size, split):
    """Of parts of the model each, or of a weight and all the rest: they take the same steps together."""
    its, net, called, optimizer = prepared(LAYER)
    if split is not None:
        named = dict(net.named_parameters())
        optimizers = [
            its.attach(torch.optim.SGD([p for name, p in named.items() if name.startswith(split) == which], lr=0.2))
            for which in (True, False)
        ]
    else:
        optimizers = [optimizer]
    for _ in range(2):
        net.zero_grad()
        backward(called, share(rank, size))
        for one in optimizers:
            one.step()
    assert its.steps_done == 2
    return its.max_grad_norm(), full(net)


def test_votes_are_used_once(pool):
    together, *others = (pool.run(2, two_optimizers, split) for split in (None, "blocks.1", "blocks.0.up.weight"))
    for split in others:
        for (bounds, values), (wanted, weights) in zip(split, together, strict=True):
            assert bounds == wanted and same(values, weights)


def resumed(rank, size, count, saved=None):
    """A run, or what is left of one; all rows are on the last rank."""
    net = Net()
    if saved is not None:
        with torch.no_grad():
            for p, value in zip(net.parameters(), saved[1], strict=True):
                p.copy_(value)
    its, net, called, optimizer = setup(net, lr=0.2, clipping=LAYER, bounds=HOW, max_grad_norm=START, **SEEDED)
    if saved is not None:
        its.load_state_dict(saved[0])
    steps(called, optimizer, samples() if rank == size - 1 else samples(0), count)
    return its.state_dict(), full(net), its.max_grad_norm()


def as_a_whole(state):
    """The bounds of a whole model that goes on where another run was."""
    its, _, called, _ = prepared(LAYER, way=None, **SEEDED)
    its.load_state_dict(state)
    backward(called, samples())
    return its.max_grad_norm()


def test_a_run_goes_on_with_other_ranks(pool):
    (whole,) = pool.run(1, resumed, 4)
    for before, after in ((2, 1), (1, 3)):
        first = pool.run(before, resumed, 2)
        assert all(state == first[0][0] for state, *_ in first)
        assert as_a_whole(json.loads(json.dumps(first[0][0]))) == pytest.approx(first[0][2], rel=1e-6)
        for _, weights, bounds in pool.run(after, resumed, 2, first[0][:2]):
            assert bounds == whole[2] and same(weights, whole[1]), (before, after)


class Either(nn.Module):
    """One that may leave a layer out."""

    def __init__(self, uses):
        super().__init__()
        self.one, self.other, self.uses = nn.Linear(3, 3), nn.Linear(3, 3) if uses is not None else nn.Identity(), uses

    def forward(self, x):
        return self.other(self.one(x)) if self.uses else self.one(x)


class Detached(Either):
    def forward(self, x):
        return self.one(x) + 0 * self.other.weight.detach().sum()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.late, self.early = nn.Linear(3, 3), nn.Linear(3, 3)
        self.early.weight = self.late.weight

    def forward(self, x):
        return self.late(self.early(x))


class Chain(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def parts(self):
        return list(self.blocks)


def attempt(*blocks):
    its, net, called, optimizer = setup(Chain(*blocks), clipping=LAYER, bounds=HOW)
    steps(called, optimizer, samples(), 1)


def second():
    its, *_ = setup(Chain(nn.Linear(3, 3)), clipping=LAYER, bounds=HOW)
    its.compile(shard(Chain(nn.Linear(3, 3))))


def second_that_is_whole():
    its, _, called, optimizer = setup(Chain(nn.Linear(3, 3)), clipping=LAYER, bounds=HOW)
    steps(called, optimizer, samples(), 1)
    backward(its.compile(Chain(nn.Linear(3, 3))), samples())


def second_in_parts():
    its = engine(clipping=LAYER, bounds=HOW)
    backward(its.compile(nn.Linear(3, 3)), samples())
    its.compile(shard(Chain(nn.Linear(3, 3))))


def moved_between(where, micro_batches):
    """Bounds that another step has moved: between the parts of a backward, or between micro-batches."""
    its, net, called, optimizer = prepared(LAYER, micro_batches=micro_batches)
    take, count = BoundScales.take, itertools.count()

    def moving(scales):
        scales.moves += next(count) == where
        return take(scales)

    with mock.patch.object(BoundScales, "take", moving):
        for rows in samples().chunk(micro_batches):
            backward(called, rows)
            optimizer.step()


REFUSED = {
    "a layer is not used": (lambda: attempt(Either(False)), "of each part of the model: one, other. Freeze what a"),
    "a layer is not used in one of two": (
        lambda: attempt(Either(None), Either(True), Either(False)),
        "clipping groups one runs backward for a model, or a part of one, whose groups are one, other:",
    ),
    "a layer without a gradient": (
        lambda: attempt(nn.Linear(3, 3), Detached(True)),
        "nothing in this step depends on the parameters of other, but",
    ),
    "a tied weight": (lambda: attempt(nn.Linear(3, 3), Tied()), "blocks.1.late and blocks.1.early share a weight"),
    "a second model": (second, "give each model an engine of its own"),
    "a second one that is whole": (second_that_is_whole, "A second model needs an engine of its own"),
    "a second one in parts": (second_in_parts, "give each model an engine of its own"),
    "between parts": (lambda: moved_between(2, 1), "bounds have moved between them"),
    "between micro-batches": (lambda: moved_between(4, 2), "bounds have moved between them"),
}


def refused(rank, size):
    return {name: text_of(case) for name, (case, _) in REFUSED.items()}


def test_what_is_refused(pool):
    (said,) = pool.run(1, refused)
    assert {name: said[name] for name, (_, text) in REFUSED.items() if text not in (said[name] or "")} == {}
