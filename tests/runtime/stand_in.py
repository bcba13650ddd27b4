"""A dynamo backend with the manners of flashdp and none of its rewriting: AOTAutograd, no Inductor, receipts."""

import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from flashdp_compile.errors import UnprotectedGradientError
from flashdp_compile.runtime import guard

guard.install()

_numbers = itertools.count()


def _interpret(graph, example_inputs):
    return make_boxed_func(graph.forward)


_aot = aot_autograd(fw_compiler=_interpret, bw_compiler=_interpret)


@guard.mark_backend
def backend(graph, example_inputs):
    """Compiles for real as far as autograd can tell: one compiled node, with receipts."""
    return guard.wrap(_aot(graph, example_inputs), guard.ReleaseInfo(label=f"graph {next(_numbers)}"))


@guard.mark_backend
def failing(graph, example_inputs):
    """Refuses every graph, after it has made the parameters known as the real backend does."""
    examples = ((node.name, getattr(node.meta.get("grapharg"), "example", None)) for node in graph.graph.nodes)
    guard.protect({name: example for name, example in examples if isinstance(example, nn.Parameter)})
    raise RuntimeError("refused by the stand-in")


backend.reset = failing.reset = guard.reset


def mlp(width=4):
    """3 features in, 1 out; parameters 0.weight, 0.bias, 2.weight, 2.bias."""
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def samples(count=5):
    return torch.randn(count, 3)


def setup(model=None, optimizer=torch.optim.SGD):
    """A model, its compiled form and an optimizer with a learning rate of 0.1."""
    model = mlp() if model is None else model
    return model, torch.compile(model, backend=backend), optimizer(model.parameters(), lr=0.1)


def refused(optimizer, *texts, closure=None, names=()):
    """The step raises with all of `texts`, changes no parameter and leaves no gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(UnprotectedGradientError) as caught:
        optimizer.step(closure) if closure else optimizer.step()
    message = " ".join(str(caught.value).split())
    for text in (*texts, *names):
        assert text in message, f"{text!r} not in: {message}"
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    return message


def accepted(optimizer, closure=None):
    """The step goes through and changes a parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    optimizer.step(closure) if closure else optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
