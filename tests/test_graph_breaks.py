"""What dynamo leaves out of a graph could mix samples, or choose by all of them what runs next: never a step."""

import contextlib

import pytest
import torch
from torch import nn

import flashdp_compile  # noqa: F401  registers the backend
from flashdp_compile.errors import Refusal, UnprotectedGradientError

OPTIONS = {"compiler": "eager", "noise_multiplier": 1.0}


class Branch(nn.Module):
    """One sample decides for all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


class Item(Branch):
    def forward(self, x):
        return self.linear(x) * (1.0 if x.sum().item() > 0 else -1.0)


class MeanBefore(Branch):
    def forward(self, x):
        x = x - x.mean(0)
        torch._dynamo.graph_break()
        return self.linear(x)


class MeanBehind(Branch):
    def forward(self, x):
        y = self.linear(x)
        torch._dynamo.graph_break()
        return y - y.mean(0)


class MeanWithoutGradient(Branch):
    """The break is where gradients are off."""

    def forward(self, x):
        with torch.no_grad():
            mean = x.mean(0)
            torch._dynamo.graph_break()
            x = x - mean
        return self.linear(x)


@torch.compiler.disable
def unseen(x):
    return x - x.mean(0)


class Disabled(Branch):
    def forward(self, x):
        return self.linear(unseen(x))


class DisabledAtTheEnd(Branch):
    def forward(self, x):
        return unseen(self.linear(x))


class InALoop(Branch):
    """Dynamo cannot go on behind a break in a loop, so it leaves this frame out and compiles what is called."""

    def inner(self, x):
        return self.linear(x)

    def forward(self, x):
        for _ in range(1):
            if x.sum() > 0:
                x = x - x.mean(0)
            x = self.inner(x)
        return x


class InATry(InALoop):
    def forward(self, x):
        try:
            if x.sum() > 0:
                x = x - x.mean(0)
            return self.inner(x)
        finally:
            pass


@contextlib.contextmanager
def somewhere():
    yield


class InAContext(InALoop):
    def forward(self, x):
        with somewhere():
            if x.sum() > 0:
                x = x - x.mean(0)
            return self.inner(x)


class OutsideOfNoGrad(Branch):
    """Called under no_grad, which it lifts."""

    def forward(self, x):
        x = x - x.mean(0)
        torch._dynamo.graph_break()
        with torch.enable_grad():
            return self.linear(x)


class Whole(Branch):
    def forward(self, x):
        return self.linear(x)


def hooked(module, kind):
    mixing = {"forward_pre": lambda m, a: (a[0] - a[0].mean(0),), "forward": lambda m, a, y: y - y.mean(0)}
    getattr(module, f"register_{kind}_hook")(mixing[kind])
    return module


BREAKS = [Branch, Item, MeanBefore, MeanBehind, MeanWithoutGradient, Disabled, DisabledAtTheEnd]


@pytest.mark.parametrize("kind", BREAKS)
def test_refused_with_the_place(kind):
    model = kind()
    compiled = torch.compile(model, backend="flashdp", options=OPTIONS)
    with pytest.raises(Refusal, match=r"dynamo broke the graph: .*test_graph_breaks\.py:\d+.*fullgraph=True"):
        compiled(torch.randn(4, 6)).sum(1).mean().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [InALoop, InATry, InAContext])
@pytest.mark.parametrize("how", ["module", "in place", "forward", "function"])
def test_frames_that_dynamo_leaves_out(kind, how):
    model = kind()
    if how == "in place":
        model.compile(backend="flashdp", options=OPTIONS)
    functions = {"module": model, "forward": model.forward, "function": lambda x: model(x)}
    compiled = model if how == "in place" else torch.compile(functions[how], backend="flashdp", options=OPTIONS)
    with pytest.raises(Refusal, match="runs as it is, and only what it calls is traced|dynamo broke the graph"):
        compiled(torch.randn(4, 6).abs()).sum(1).mean().backward()
    assert all(p.grad is None for p in model.parameters())


def test_code_that_was_compiled_for_another_call():
    """What `inner` was compiled to is found again, with nothing to compile."""
    model, x = InALoop(), torch.randn(4, 6).abs()
    torch.compile(model.inner, backend="flashdp", options=OPTIONS)(x)
    with pytest.raises(Refusal, match="runs as it is"):
        torch.compile(model, backend="flashdp", options=OPTIONS)(x)


def test_errors_that_are_suppressed():
    model = InALoop()
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(Refusal, match="runs as it is"):
        torch.compile(model, backend="flashdp", options=OPTIONS)(torch.randn(4, 6).abs())


def test_gradients_that_are_switched_on_within_no_grad():
    with torch.no_grad(), pytest.raises(Refusal, match="dynamo broke the graph|runs as it is"):
        torch.compile(OutsideOfNoGrad(), backend="flashdp", options=OPTIONS)(torch.randn(4, 6))


@pytest.mark.parametrize("kind", ["forward_pre", "forward"])
@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_of_the_compiled_module(kind, in_place):
    """They run outside of the graph, also under fullgraph=True; those of its parts are traced."""
    model = hooked(Whole(), kind)
    settings = {"backend": "flashdp", "fullgraph": True, "options": OPTIONS}
    compiled = torch.compile(model, **settings) if not in_place else model
    if in_place:
        model.compile(**settings)
    with pytest.raises(Refusal, match=f"has {kind.replace('_', ' ')} hooks, which run outside of the graph"):
        compiled(torch.randn(4, 6))
    inner = nn.Sequential(hooked(nn.Linear(6, 3), kind))
    with pytest.raises(Refusal, match="computed from the whole batch"):
        torch.compile(inner, **settings)(torch.randn(4, 6))


class Remembers(nn.Module):
    """A running mean in a buffer that is assigned, not written to: an output like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        y = self.linear(x - self.mean)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return y


def test_a_buffer_that_an_earlier_call_has_assigned():
    compiled = torch.compile(Remembers(), backend="flashdp", fullgraph=True, options=OPTIONS)
    compiled(torch.randn(4, 6))
    with pytest.raises(Refusal, match="buffer mean was assigned in an earlier compiled call"):
        compiled(torch.randn(4, 6))


def test_a_buffer_that_is_returned_is_no_memory():
    class Returns(Remembers):
        def forward(self, x):
            return self.linear(x - self.mean), self.mean

    compiled = torch.compile(Returns(), backend="flashdp", fullgraph=True, options=OPTIONS)
    for _ in range(3):
        compiled(torch.randn(4, 6))[0].sum(1).mean().backward()


@pytest.mark.parametrize("kind", BREAKS)
def test_evaluation_may_break(kind):
    model, x = kind(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="flashdp", options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_a_step_that_calls_backward_itself():
    model, optimizer = Branch(), None
    model.forward = lambda x: model.linear(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    @torch.compile(backend="flashdp", options=OPTIONS)
    def step(x):
        model(x).sum(1).mean().backward()
        optimizer.step()

    with pytest.raises(Refusal, match="dynamo broke the graph: .*backward"):
        step(torch.randn(4, 6))


class Recurrent(nn.Module):
    """Dynamo runs it eagerly as a whole, unless torch._dynamo.config.allow_rnn says otherwise: nothing is left to trace
    behind the cells, so no graph is ever compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def losses(self, x):
        return self.model(x)


class Owner:
    def __init__(self, model: nn.Module) -> None:
        self.trainer = Trainer(model)


def compiled_module(model):
    return torch.compile(model, backend="flashdp", options=OPTIONS)


def compiled_method(model):
    return torch.compile(Trainer(model).losses, backend="flashdp", options=OPTIONS)


def compiled_closure_over_a_dict(model):
    parts = {"model": model}
    return torch.compile(lambda x: parts["model"](x), backend="flashdp", options=OPTIONS)


def compiled_closure_over_an_object(model):
    owner = Owner(model)
    return torch.compile(lambda x: owner.trainer.losses(x), backend="flashdp", options=OPTIONS)


@pytest.mark.parametrize(
    "compiled_by",
    [compiled_module, compiled_method, compiled_closure_over_a_dict, compiled_closure_over_an_object],
)
def test_what_runs_eagerly_as_a_whole_is_not_stepped_on(compiled_by):
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    losses = compiled_by(model)
    losses(torch.randn(4, 5, 6)).sum().backward()
    with pytest.raises(UnprotectedGradientError, match="cells.weight_ih_l0"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_another_model_of_a_trainer_is_its_own_affair():
    """The compiled method has a graph, so what it does not use was not meant."""
    trainer = Trainer(nn.Linear(6, 3))
    trainer.public = nn.Linear(6, 3)
    losses = torch.compile(trainer.losses, backend="flashdp", fullgraph=True, options=OPTIONS)
    losses(torch.randn(4, 6)).sum(1).mean().backward()
    optimizer = torch.optim.SGD(trainer.public.parameters(), 0.1)
    trainer.public(torch.randn(4, 6)).sum().backward()
    optimizer.step()
