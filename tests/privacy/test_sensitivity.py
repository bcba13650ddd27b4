"""What one sample adds to a release is no longer than its bound, whatever the sample; noise off.

The bound is C_k (1 + slack) for every clipping group k, with the slack that the plan states and the noise is raised by.
A difference of two releases also carries the rounding of both sums to float32, which is allowed for on top.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flashdp_compile.passes.groups import form_groups
from privacy.attacks import MODELS, attacks
from privacy.steps import CLIP_FNS, SINGLE_SLACK, STRATEGIES, compiled, flat, gradients, recorded_plans
from zoo import Model

BATCH = 3
EPS = torch.finfo(torch.float32).eps


class Victim:
    """A compiled model with its initial parameters at hand. Steps are in the parameters' gradients, loss summed."""

    def __init__(self, name, **options):
        build, self.width = MODELS[name]
        torch.manual_seed(1)
        self.model = build()
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.bound = options.setdefault("max_grad_norm", 0.5)
        self.clipping = options.get("clipping", "flat")
        self.module = compiled(self.model, loss_reduction="sum", **options)

    def release(self, attack, weights, prepare=lambda tensor: None):
        """The gradients of sum_b weights_b loss_b."""
        with torch.no_grad():
            for p, start in zip(self.model.parameters(), self.start, strict=True):
                p.copy_(attack.scale * start)
        x, ids = attack.x.contiguous(), attack.ids.contiguous()
        prepare(x)
        prepare(ids)
        losses = (self.module(x, ids) * attack.coefficients).flatten(1).sum(1)
        (losses * weights).sum().backward()
        return gradients(self.model)


def lengths(victim, released):
    """The norm over each clipping group, in units of the group's bound."""
    groups = form_groups(list(released), victim.clipping, victim.bound)
    return {g.name: float(flat({n: released[n] for n in g.members}).norm()) / g.bound for g in groups}


def attack_all(victim, batch, plans=None, slack=SINGLE_SLACK, prepare=lambda tensor: None):
    """Asserts the bound for every attack, and that the attacks were worth it: most of them reach it."""
    reached, wrong = 0, []
    for number, attack in enumerate(attacks(batch, victim.width)):
        everyone, victim_alone, others = torch.ones(batch), torch.zeros(batch), torch.ones(batch)
        victim_alone[number % batch] = 1
        others[number % batch] = 0
        alone = victim.release(attack, victim_alone, prepare)
        plan = plans[-1] if plans else None
        allowed = 1 + (plan.slack if plan else slack)
        found = lengths(victim, alone)
        reached += max(found.values()) > 0.9
        wrong += [(attack.name, "alone", k, n) for k, n in found.items() if not n <= allowed * (1 + 2 * EPS)]
        if batch > 1:
            all_of_them = victim.release(attack, everyone, prepare)
            without = victim.release(attack, others, prepare)
            difference = {name: all_of_them[name].double() - without[name].double() for name in without}
            found = lengths(victim, difference)
            most = allowed + 4 * batch * EPS
            wrong += [(attack.name, "difference", k, n) for k, n in found.items() if not n <= most]
    assert not wrong, wrong
    assert reached >= 6


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_that_takes_no_part(name):
    """The neighbouring batch is one sample shorter, and those behind the missing one move up."""
    victim = Victim(name)
    attack = next(attacks(BATCH, victim.width))
    everyone = victim.release(attack, torch.ones(BATCH))
    for missing in range(BATCH):
        kept = [b for b in range(BATCH) if b != missing]
        rest = replace(attack, x=attack.x[kept], ids=attack.ids[kept], coefficients=attack.coefficients[kept])
        without = victim.release(rest, torch.ones(BATCH - 1))
        difference = flat({n: everyone[n].double() - without[n].double() for n in without})
        assert difference.norm() <= victim.bound * (1 + 2.0**-9 + 4 * BATCH * EPS)


# a norm and a convolution have one strategy only
RUNS = [(n, s, c) for n in MODELS for s in STRATEGIES for c in CLIP_FNS if s == "auto" or n not in ("norm", "conv")]


@pytest.mark.parametrize(("name", "strategy", "clip_fn"), RUNS)
def test_one_sample_of_a_batch(name, strategy, clip_fn):
    with recorded_plans() as plans:
        victim = Victim(name, norm_strategy=strategy, clip_fn=clip_fn)
        attack_all(victim, BATCH, plans)
    assert len(plans) == 1, "one compilation serves all attacks"


@pytest.mark.parametrize("clip_fn", CLIP_FNS)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_one(name, clip_fn):
    """Static B=1 is rewritten by a way of its own."""
    attack_all(Victim(name, clip_fn=clip_fn), 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["linear", "embedding", "tied", "attention"])
def test_a_batch_of_one_whose_size_is_dynamic(name, strategy):
    with recorded_plans() as plans:
        victim = Victim(name, norm_strategy=strategy)
        attack_all(victim, 1, plans, prepare=lambda t: torch._dynamo.decorators.mark_unbacked(t, 0))
    assert len(plans) == 1


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("clipping", ["per_layer", {"*.weight": "weights", "*": "rest"}], ids=["per_layer", "groups"])
@pytest.mark.parametrize("name", ["attention", "deep"])
def test_every_group_has_its_own_bound(name, clipping, batch):
    with recorded_plans() as plans:
        victim = Victim(name, clipping=clipping)
        attack_all(victim, batch, plans)
    groups = form_groups([n for n, _ in victim.model.named_parameters()], clipping, victim.bound)
    assert len(groups) > 1
    assert math.isclose(sum(g.bound**2 for g in groups), victim.bound**2)
    assert [p.groups for p in plans] == ([] if batch == 1 else [groups])


@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_groups_of_a_step_share_the_bound(batch):
    """A layer that a step does not use takes no share; with or without it the sensitivity is max_grad_norm."""
    model = Model(lambda m, x, both: m.a(x) + m.b(x) if both else m.a(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    module = compiled(model, clipping="per_layer", loss_reduction="sum", max_grad_norm=0.5)
    x, weights = 1e3 * torch.randn(batch, 4), torch.eye(batch)[0]
    for both in (False, True, False):
        (module(x, both).sum(1) * weights).sum().backward()
        assert (model.b.weight.grad is not None) == both
        released = gradients(model)
        for name in ("a", "b") if both else ("a",):
            norm = flat({n: g for n, g in released.items() if n.startswith(name)}).norm()
            assert math.isclose(norm, 0.5 / math.sqrt(1 + both), rel_tol=1e-3)
        assert 0.499 < flat(released).norm() <= 0.5 * (1 + 2.0**-9)


def test_bounds_given_by_name():
    with recorded_plans() as plans:
        bounds = {"e.*": 1e-3, "b.*": 1e3, "*": 1.0}
        victim = Victim("deep", clipping="per_layer", max_grad_norm=bounds)
        attack_all(victim, BATCH, plans)
    assert [g.bound for g in plans[0].groups] == [1e-3, 1e3, 1.0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("time", [64, 512])
def test_many_tokens_that_cancel(strategy, time):
    """The norm of what remains is far below the rounding of what was summed."""
    torch.manual_seed(0)
    model = torch.nn.Linear(24, 16)
    with recorded_plans() as plans:
        module = compiled(model, norm_strategy=strategy, loss_reduction="sum", max_grad_norm=1.0)
        for kind in range(3):
            x = 1e4 * torch.randn(2, time // 2, 24)
            coefficients = 1e4 * torch.randn(2, time // 2, 16)
            x = torch.cat([x, x * (1 + 1e-7 * kind)], 1)
            coefficients = torch.cat([coefficients, -coefficients], 1)
            if kind == 2:
                order = torch.randperm(time)
                x, coefficients = x[:, order], coefficients[:, order]
            ((module(x) * coefficients).sum((1, 2)) * torch.tensor([1.0, 0.0])).sum().backward()
            assert flat(gradients(model)).norm() <= 1 + plans[0].slack + 2 * EPS


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "options", [{"clip_fn": "normalize"}, {"max_grad_norm": 1e-22}], ids=["normalize", "tiny bound"]
)
def test_gradients_whose_squares_underflow(options, batch):
    """2000 elements of 2.6e-23 have length 1.2e-21, but their squares are zero in float32."""
    model = torch.nn.Linear(2000, 1, bias=False)
    module = compiled(model, norm_strategy="materialize", loss_reduction="sum", **options)
    x = torch.full((batch, 2000), 2.6e-23)
    x[:, 0] *= 4
    (module(x).sum(1) * torch.eye(batch)[0]).sum().backward()
    assert flat(gradients(model)).norm() <= options.get("max_grad_norm", 1.0) * (1 + 2.0**-9)


def test_a_huge_bound_under_normalize():
    model = torch.nn.Linear(3, 1, bias=False)
    module = compiled(model, norm_strategy="materialize", clip_fn="normalize", max_grad_norm=1e20)
    module(torch.full((2, 3), 1e-20)).sum(1).mean().backward()
    assert flat(gradients(model)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"expected_batch_size": 8}], ids=["own size", "expected"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_bound_of_a_mean_is_over_the_divisor(options, batch):
    """loss.mean() has the samples' gradients over B; what is released is the clipped sum over L."""
    model = torch.nn.Linear(WIDTH := 4, 3)
    module = compiled(model, max_grad_norm=0.5, **options)
    x, weights = 1e3 * torch.randn(batch, WIDTH), torch.eye(batch)[0]
    (module(x).sum(1) * weights).mean().backward()
    released = flat(gradients(model)).norm() * options.get("expected_batch_size", batch)
    assert 0.5 * (1 - 1e-5) <= released <= 0.5 * (1 + 2.0**-9)
