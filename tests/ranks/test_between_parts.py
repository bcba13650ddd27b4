"""What must not be done to a model of sharded parts: each is refused, by name, and nothing is released."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from engine.runs import engine, samples
from flashdp_compile import accounting
from ranks.runs import same, text_of
from ranks.sharded import full, setup, shard


class Mixing(torch.autograd.Function):
    """Gives back the tensor that it is given, as if it had changed it, and mixes gradients."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad.mean(0, keepdim=True).expand_as(grad)


def other_data(net, x):
    x.data = torch.zeros(8, 3)
    return x


def remembered(net, x):
    kept, net.kept = net.kept, x
    return x if kept is None else kept


def as_buffer(net, x):
    net.scale = x
    return x


def given(net, x):
    net.blocks[1].memo = torch.ones(8, 3)
    return x


def hooked(net, x):
    x.register_hook(lambda grad: grad.mean(0, keepdim=True).expand_as(grad))
    return x


class Carrier(int):
    """A number that holds a tensor, of which nobody knows what it holds."""

    def __init__(self, value):
        self.tensor = UNKNOWN


UNKNOWN = torch.ones(8, 3)


class Part(nn.Linear):
    """Parts of one class share what is compiled."""

    memo = None

    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x, carrier=None):
        memo = self.memo if carrier is None else carrier.tensor
        return super().forward(x if memo is None else x + memo)


class Net(nn.Module):
    """`between(net, x)` is what its forward does behind the first two parts."""

    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = Part(), Part()
        self.blocks = nn.ModuleList(Part() for _ in range(2))
        self.register_buffer("scale", torch.ones(5))
        self.between, self.kept = between, None

    def forward(self, x):
        x = self.blocks[0](self.first(x))
        if self.between is not None:
            x = self.between(self, x)
        return self.head(self.blocks[1](x))

    def parts(self):
        return [self.first, *self.blocks, self.head]


BETWEEN = {
    "mean": (lambda net, x: x - x.mean(0), "aten.mean.dim is called"),
    "in place": (lambda net, x: x.mul_(2), "aten.mul_.Tensor is called"),
    "control flow": (lambda net, x: x if float(x.detach().sum()) > 0 else net.blocks[0](x), "is called"),
    "unknown": (lambda net, x: (torch.ones(2).add_(net.strange), x)[1], "on a tensor between two parts"),
    "function": (lambda net, x: Mixing.apply(x), "was changed before it came to a part"),
    "data": (other_data, "was changed before it came to a part"),
    "memory": (remembered, "that no other part has returned"),
    "buffer": (as_buffer, "buffer scale is a tensor that holds samples of an earlier call"),
    "attribute": (given, "cannot tell what tensor 'module.memo'"),
    "hook on a tensor": (hooked, "has a hook on its gradient, which could mix samples"),
    "checkpoint": (lambda net, x: checkpoint(net.blocks[1], x, use_reentrant=False), "not from outside"),
    "reentrant checkpoint": (lambda net, x: checkpoint(net.blocks[1], x, use_reentrant=True), "under torch.no_grad()"),
    "twice": (lambda net, x: net.blocks[0](x), "went not once through each part"),
    "carrier": (lambda net, x: net.blocks[1](x, Carrier(1)), "a Carrier is passed to or by a model"),
}


def harmless(net, x):
    """What holds no samples may be computed."""
    return x if (net.scale * 2 + torch.arange(5)).sum() > 0 else net.blocks[0](x)


class Run:
    """A run, with what a case does to it."""

    def __init__(self, net=None, way="parts", **settings):
        self.its, self.net, self.called, self.optimizer = setup(
            Net() if net is None else net, way, noise_multiplier=1.0, **settings
        )

    def forward(self):
        return self.called(samples()).square().sum(1).mean()

    def step(self):
        self.forward().backward()
        self.optimizer.step()


def stale(run):
    for p in run.net.parameters():
        p.grad = torch.ones_like(p)
    run.step()


def regularised(run):
    (run.forward() + sum(p.square().sum() for p in run.net.parameters()).full_tensor()).backward()
    run.optimizer.step()


def larger(p):
    if p.grad is not None:
        p.grad.mul_(100)


def shard_hook(run):
    run.net.first.weight.register_post_accumulate_grad_hook(larger)
    run.step()


def late_shard_hook(run):
    """It finds no gradient: sums are out of its reach."""
    loss = run.forward()
    run.net.first.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.ones_like(p)))
    loss.backward()
    run.optimizer.step()


def whole_hook(run):
    run.net.first.unshard()
    run.net.first.weight.register_post_accumulate_grad_hook(larger)
    run.net.first.reshard()
    run.step()


def rescaled(run):
    loss = run.forward()
    run.net.blocks[0].set_gradient_divide_factor(0.01)
    loss.backward()
    run.optimizer.step()


def unsynced(run):
    loss = run.forward()
    run.net.set_requires_gradient_sync(False)
    loss.backward()
    with contextlib.suppress(Exception):
        run.optimizer.step()
    run.net.set_requires_gradient_sync(True)
    run.step()


def first_set(name, *values):
    def case(run):
        getattr(run.net.blocks[0], name)(*values)
        run.step()

    case.__name__ = name
    return case


def not_the_last(run):
    """Nobody would wait for sums that are on their way."""
    run.net.set_is_last_backward(False)
    run.step()


def unattached(run):
    run.forward().backward()
    torch.optim.SGD(run.net.parameters(), lr=1.0).step()


def assigned(run):
    run.net.load_state_dict({k: v.clone() for k, v in run.net.state_dict().items()}, assign=True)
    run.forward().backward()
    torch.optim.SGD(run.net.parameters(), lr=1.0).step()


def twice_backward(run):
    loss = run.forward()
    loss.backward(retain_graph=True)
    loss.backward()
    run.optimizer.step()


def twice_backward_flat(run):
    run = Run(clipping="flat")
    loss = run.forward()
    loss.backward(retain_graph=True)
    loss.backward()


def given_gradient(run):
    run = Run(clipping="flat")
    run.called(samples().requires_grad_())


def frozen(run):
    run.net.first.requires_grad_(False)
    run.step()


def narrow(run):
    run = Run(way="bfloat16")
    run.forward()
    run.net.first.unshard()
    for parameter in run.net.first.parameters():  # fully_shard refuses a group with gradients of several dtypes
        parameter.grad_dtype = torch.bfloat16
    run.net.first.reshard()
    run.step()


def module_hook(run):
    run.net.blocks[1].register_forward_hook(lambda module, args, out: out - out.mean(0))
    run.step()


def backward_hook(run):
    run.net.blocks[1].register_full_backward_hook(lambda module, given, got: None)
    run.step()


def compiled_again(run):
    engine(clipping="per_block").compile(run.net)


def compiled_around(run):
    torch.compile(run.net, backend="eager")(samples())


def part_compiled_around(run):
    run.net.blocks[0].compile(backend="eager", fullgraph=True)
    run.forward()


REDUCTION = "torch.distributed.fsdp._fully_shard._fsdp_param_group.foreach_reduce"


def unreduced(run):
    """The backward ends where gradients are to be added up, as if another rank was gone."""
    loss = run.forward()
    with mock.patch(REDUCTION, side_effect=RuntimeError), contextlib.suppress(RuntimeError):
        loss.backward()
    run.optimizer.step()


def thawed(net):
    net.first.requires_grad_(False)
    shard(net)


def other_forward(net):
    shard(net)
    net.first.forward = lambda x: 0 * type(net.first).forward(net.first, x)


def ignored(net):
    for part in net.parts()[:3]:
        fully_shard(part)
    fully_shard(net, ignored_params=set(net.head.parameters()))


def loose(net):
    shard(net)
    net.alone = nn.Parameter(torch.ones(3))


def container(net):
    net.inner = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    fully_shard(net.inner[0])
    fully_shard(net.inner)
    shard(net)


def columns(net):
    shard(net, shard_placement_fn=lambda p: Shard(p.dim() - 1))


RUNS = {
    stale: "p.grad already held a gradient of unknown origin",
    regularised: "p.grad already held a gradient of unknown origin",
    shard_hook: "has a hook on its gradient, which has no noise before",
    late_shard_hook: "was not made by a backward that flashdp compiled",
    whole_hook: "something else was added to the released gradient",
    rescaled: "fully_shard was told, behind the forward,",
    unsynced: "p.grad already held a gradient of unknown origin",
    not_the_last: "fully_shard was told to use set_is_last_backward(False)",
    unattached: "has no noise yet",
    assigned: "has taken the place of another since",
    twice_backward: "two backward passes went through one forward",
    twice_backward_flat: "two backward passes went through one forward",
    given_gradient: "an argument of the model requires a gradient",
    narrow: "clipped sums were rounded to less than float32",
    frozen: "was frozen behind engine.compile",
    module_hook: "a part of the model has the hook module_hook",
    backward_hook: "a part of the model has the hook backward_hook",
    compiled_again: "was compiled part by part before",
    compiled_around: "call the model as engine.compile has left it",
    part_compiled_around: "call the model as engine.compile has left it",
    unreduced: "nothing came back that was added up over all ranks",
    first_set("set_gradient_divide_factor", 2.0): "a gradient divide factor",
    first_set("set_force_sum_reduction_for_comms", False): "a gradient divide factor",
    first_set("set_requires_gradient_sync", False): "set_requires_gradient_sync(False)",
    first_set("set_custom_reduce_scatter", object()): "a reduce-scatter of its own",
}


def low(net, **settings):
    shard(net, mp_policy=MixedPrecisionPolicy(**settings))


ESTIMATED = {
    "options": {"norm": "hutchinson", "probes": 16, "compiler": "eager"},
    "sampling": accounting.Poisson(0.1, 80),
}
COMPILED = {
    "by pattern": (shard, {"clipping": {"*bias": "a", "*": "b"}}, "is not known for a model of sharded parts"),
    "batch_dim by name": (
        shard,
        {"options": {"compiler": "eager", "batch_dim": {"args.0": 0}}},
        "what parts of a model hand to each other has no names",
    ),
    "bounds by name": (shard, {"max_grad_norm": {"*": 1.0}}, "give a number"),
    "estimates of other groups": (shard, {**ESTIMATED, "groups": 3}, "Give the engine groups=4"),
    "estimates for one bound": (
        shard,
        {**ESTIMATED, "clipping": "flat"},
        "the second run of the backward would rest on the estimates of the first",
    ),
    "moving bounds": (
        shard,
        {"bounds": lambda step: 1.0, "clipping": "flat"},
        "bounds that move are not known for clipping='flat' of a model in parts",
    ),
    "forward of an object": (other_forward, {}, "first has a forward that was assigned to the object"),
    "ignored": (ignored, {}, "head.weight is not sharded over all 1 ranks"),
    "parameter of its own": (loose, {}, "alone belongs to a module other parts of which are sharded"),
    "container": (container, {}, "inner is sharded, and so are modules inside of it"),
    "columns": (columns, {}, "noise is known for shards of dimension 0"),
    "thawed": (thawed, {}, "was frozen when the engine compiled the model"),
    "sums of 16 bits": (lambda net: low(net, reduce_dtype=torch.bfloat16), {}, "reduce_dtype of 16 bits"),
}


def between(code):
    net = Net(code)
    net.strange = torch.ones(2)
    run = Run(net)
    for _ in range(2):
        run.step()


def compiled(prepare, settings):
    net = Net()
    prepare(net)
    its = engine(**{"clipping": "per_block", **settings})
    its.compile(net)
    net.first.requires_grad_(True)
    net(samples())


def attempted(rank, size, names):
    """What each of these cases says."""
    texts = {name: text_of(lambda code=code: between(code)) for name, (code, _) in BETWEEN.items() if name in names}
    for case in RUNS:
        if case.__name__ not in names:
            continue
        run = Run()
        start = full(run.net)
        texts[case.__name__] = text_of(lambda case=case, run=run: case(run))
        assert run.its.steps_done == 0 and same(start, full(run.net)), case.__name__
    for name, (prepare, settings, _) in COMPILED.items():
        if f"compiled: {name}" not in names:
            continue
        texts[f"compiled: {name}"] = text_of(lambda p=prepare, s=settings: compiled(p, s))
    between(harmless)
    return texts


EXPECTED = {
    **{name: text for name, (_, text) in BETWEEN.items()},
    **{case.__name__: text for case, text in RUNS.items()},
    **{f"compiled: {name}": text for name, (_, _, text) in COMPILED.items()},
}


MOST_TELLING = (
    *("mean", "control flow", "unknown", "function", "memory", "buffer", "hook on a tensor", "twice"),
    *("stale", "shard_hook", "late_shard_hook", "rescaled", "unsynced", "unattached", "twice_backward", "module_hook"),
    *("frozen", "compiled_around", "part_compiled_around", "unreduced", "twice_backward_flat", "given_gradient"),
    *("compiled: by pattern", "compiled: container", "compiled: columns", "compiled: thawed"),
    *("compiled: sums of 16 bits", "compiled: moving bounds"),
)


@pytest.mark.parametrize("names", [MOST_TELLING, tuple(EXPECTED)], ids=["most telling", "all"])
def test_what_is_refused(pool, names):
    """In one go, as what takes long is to begin."""
    (said,) = pool.run(1, attempted, names)
    assert said.keys() == set(names)
    assert {name: said[name] for name in names if EXPECTED[name] not in (said[name] or "")} == {}
