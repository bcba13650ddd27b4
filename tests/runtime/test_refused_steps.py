"""Every known way for an unprotected gradient to reach an optimizer: the step is refused, the gradients are gone."""

import pytest
import torch
from torch import nn

from flashdp_compile.errors import Refusal, UnprotectedGradientError
from runtime.stand_in import accepted, backend, failing, mlp, refused, samples, setup

PLAIN = "the gradient was not made by a backward that flashdp compiled"
MIXED = "within one backward, something else was added to the released gradient"
ACCUMULATED = "two backward passes were accumulated in p.grad"
GRAPHS = "one backward ran several compiled graphs"
BACKWARDS = "hold releases of several backward passes"
REPLACED = "p.grad was assigned by hand"


def compiled_step(compiled, optimizer):
    optimizer.zero_grad()
    compiled(samples()).sum().backward()
    accepted(optimizer)
    optimizer.zero_grad()


def test_plain_backward():
    model, compiled, optimizer = setup()
    compiled_step(compiled, optimizer)
    model(samples()).sum().backward()
    refused(optimizer, PLAIN, names=["0.weight, 0.bias, 2.weight, 2.bias"])
    compiled_step(compiled, optimizer)  # and training can go on


def test_plain_backward_before_the_first_compiled_call():
    model, compiled, optimizer = setup()
    model(samples()).sum().backward()
    refused(optimizer, PLAIN, "was the model itself called instead of the compiled one?", names=["0.weight, 0.bias"])


def test_plain_gradient_added_to_a_release():
    model, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    model(samples()).sum().backward()
    refused(optimizer, PLAIN)


def test_release_added_to_a_plain_gradient():
    model, compiled, optimizer = setup()
    compiled_step(compiled, optimizer)
    model(samples()).sum().backward()
    compiled(samples()).sum().backward()
    refused(optimizer, PLAIN)


def test_many_parameters_are_counted():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    _, compiled, optimizer = setup(model)
    compiled_step(compiled, optimizer)
    model(samples()).sum().backward()
    refused(optimizer, "0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 3 more: the gradient")


def test_force_eager_after_compilation():
    _, compiled, optimizer = setup()
    compiled_step(compiled, optimizer)
    with torch.compiler.set_stance("force_eager"):
        compiled(samples()).sum().backward()
    refused(optimizer, PLAIN, "torch.compiler.set_stance('force_eager') is active")


@pytest.mark.parametrize("how", ["module", "method", "function"])
def test_force_eager_from_the_start(how):
    model = mlp()
    if how == "module":
        compiled = torch.compile(model, backend=backend)
    elif how == "method":
        model.compile(backend=backend)
        compiled = model
    else:
        compiled = torch.compile(lambda x: model(x), backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.compiler.set_stance("force_eager"):
        compiled(samples()).sum().backward()
        refused(optimizer, PLAIN, "set_stance('force_eager')", names=["0.weight"])


def test_force_eager_on_a_model_that_was_public_before():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(samples()).sum().backward()
    accepted(optimizer)
    optimizer.zero_grad()
    compiled = torch.compile(model, backend=backend)
    with torch.compiler.set_stance("force_eager"):
        compiled(samples()).sum().backward()
    refused(optimizer, PLAIN)


def test_recompile_limit():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 1)
            self.calls = 0

        def forward(self, x):
            return self.fc(x) * self.calls

    model = Counting()
    _, compiled, optimizer = setup(model)
    with torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False, assume_static_by_default=True):
        for calls in range(1, 3):
            model.calls = float(calls)
            compiled_step(compiled, optimizer)
        model.calls = 7.0
        compiled(samples()).sum().backward()
        refused(optimizer, PLAIN, "forward (", "was compiled 2 times, the recompile limit", names=["fc.weight"])


@pytest.mark.parametrize("known", [True, False])
def test_suppressed_errors(known):
    def careless(graph, example_inputs):
        raise RuntimeError("refused")

    careless._flashdp_backend = True
    model = mlp()
    compiled = torch.compile(model, backend=failing if known else careless)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch._dynamo.config.patch(suppress_errors=True):
        compiled(samples()).sum().backward()
        refused(optimizer, PLAIN, "suppress_errors is on")


class Broken(nn.Module):
    """Two compiled graphs with a graph break between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = self.first(x)
        torch._dynamo.graph_break()
        return self.second(torch.tanh(h))


def test_graph_break():
    """What is compiled behind it is called from the middle of a frame that is in no graph."""
    _, compiled, _ = setup(Broken())
    with pytest.raises(Refusal, match=r"forward \(.*test_refused_steps\.py:\d+\) runs as it is"):
        compiled(samples())


def chained():
    """Two compiled regions, one behind the other."""
    model = Broken()
    parts = [torch.compile(part, backend=backend) for part in (model.first, model.second)]
    return model, lambda x: parts[1](torch.tanh(parts[0](x)))


def test_two_regions_in_one_backward():
    model, forward = chained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forward(samples()).sum().backward()
    refused(optimizer, GRAPHS, "- graph", names=["weight, bias, weight, bias: one"])


def test_two_regions_hidden_by_one_optimizer_per_region():
    model, forward = chained()
    first = torch.optim.SGD(model.first.parameters(), lr=0.1)
    second = torch.optim.SGD(model.second.parameters(), lr=0.1)
    forward(samples()).sum().backward()
    refused(first, GRAPHS, names=["weight, bias: one"])
    refused(second, GRAPHS, names=["weight, bias: one"])


def test_parameter_outside_of_the_region():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = mlp(), nn.Parameter(torch.ones(1))
            self.run = torch.compile(self.body, backend=backend)

        def forward(self, x):
            return self.run(x) * self.scale

    model = Outside()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    model(samples()).sum().backward()
    message = refused(optimizer, PLAIN, names=["scale: the gradient"])
    assert "body" not in message


@pytest.mark.parametrize("order", ["inside first", "outside first", "both sides"])
def test_parameter_used_inside_and_outside(order):
    model, compiled, optimizer = setup()
    weight = model[0].weight
    outside = [lambda: weight.square().sum()] * (2 if order == "both sides" else 1)
    x = samples()
    inside = [lambda: compiled(x).sum()]
    terms = {
        "inside first": [*inside, *outside],
        "outside first": [*outside, *inside],
        "both sides": [outside[0], *inside, outside[0]],
    }[order]
    sum(term() for term in terms).backward()
    message = refused(optimizer, MIXED, names=["0.weight: within"])
    assert "0.bias" not in message


@pytest.mark.filterwarnings("ignore:Using backward")
def test_parameter_used_inside_and_outside_with_create_graph():
    model, compiled, optimizer = setup()
    weight = model[0].weight
    out = weight.square().sum() + compiled(samples()).sum() + weight.sum()
    out.backward(create_graph=True)
    refused(optimizer, MIXED, names=["0.weight: within"])


def test_outside_use_of_the_same_size_in_a_loop():
    """Freed memory may be handed out again at the same address: many tries."""
    model, compiled, optimizer = setup()
    weight = model[0].weight
    for _ in range(10):
        (compiled(samples()).sum() + weight.sum()).backward()
        refused(optimizer, MIXED)


def test_same_parameter_in_two_compiled_graphs():
    model, compiled, optimizer = setup()
    (
        compiled(samples(4)).sum() + torch.compile(lambda x: model(x).square(), backend=backend)(samples(4)).sum()
    ).backward()
    refused(optimizer, MIXED)


def test_same_graph_called_twice_in_one_backward():
    model, compiled, optimizer = setup()
    (compiled(samples()).sum() + compiled(samples()).sum()).backward()
    refused(optimizer, MIXED)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_tensor_hook_that_changes_the_gradient(in_place, late):
    """Whether it was registered before or after the parameters were first seen."""
    model, compiled, optimizer = setup()
    if late:
        compiled(samples())
    model[0].weight.register_hook(lambda grad: grad.mul_(2) if in_place else grad * 2)
    compiled(samples()).sum().backward()
    refused(optimizer, MIXED, "a tensor hook on it", names=["0.weight: within"])


@pytest.mark.parametrize("late", [False, True])
def test_hook_that_replaces_the_gradient(late):
    model, compiled, optimizer = setup()
    if late:
        compiled(samples())
    parameter = model[0].weight
    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * 2))
    compiled(samples()).sum().backward()
    refused(optimizer, REPLACED, names=["0.weight: p.grad"])


def test_disabled_submodule():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.second(self.hidden(x))

        @torch.compiler.disable
        def hidden(self, x):
            return torch.tanh(self.first(x))

    _, compiled, _ = setup(Half())
    with pytest.raises(Refusal, match="runs as it is, and only what it calls is traced"):
        compiled(samples())


def test_plain_input_that_is_trained():
    """Only parameters are clipped and noised: a trained input tensor gets its plain gradient out of the graph."""
    model, compiled, _ = setup()
    prompt = samples().requires_grad_()
    optimizer = torch.optim.SGD([*model.parameters(), prompt], lr=0.1)
    compiled(prompt).sum().backward()
    message = refused(optimizer, PLAIN, "parameter 4 of group 0, shape (5, 3): the")
    assert "0.weight" not in message


def test_second_plain_model_on_the_same_optimizer():
    (model, compiled, _), other = setup(), mlp()
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": other.parameters()}], lr=0.1)
    compiled(samples()).sum().backward()
    other(samples()).sum().backward()
    refused(optimizer, PLAIN, "parameter 0 of group 1, shape (4, 3)", "an optimizer of its own")
    alone = torch.optim.SGD(other.parameters(), lr=0.1)
    other(samples()).sum().backward()
    accepted(alone)  # as the message advises


def test_two_compiled_models_on_one_optimizer():
    (first, run_first, _), (second, run_second, _) = setup(), setup(mlp(6))
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    run_first(samples()).sum().backward()
    run_second(samples()).sum().backward()
    refused(optimizer, BACKWARDS, "several backward passes - graph")
    (run_first(samples()).sum() + run_second(samples()).sum()).backward()
    refused(optimizer, GRAPHS)


def test_second_backward_without_a_step():
    _, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    compiled(samples()).sum().backward()
    refused(optimizer, ACCUMULATED, "each backward is a complete release", "call optimizer.zero_grad() between")


def test_backward_after_a_step_without_zero_grad():
    _, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    accepted(optimizer)
    compiled(samples()).sum().backward()
    refused(optimizer, ACCUMULATED)


def test_retained_graph():
    _, compiled, optimizer = setup()
    loss = compiled(samples()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    refused(optimizer, ACCUMULATED)


def test_second_step_on_one_release():
    _, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    accepted(optimizer)
    refused(optimizer, "p.grad still holds the release of an earlier step")


def test_stale_plain_gradient_of_unknown_origin():
    model, compiled, optimizer = setup()
    x = samples()
    for parameter, grad in zip(
        model.parameters(), torch.autograd.grad(model(x).sum(), model.parameters()), strict=True
    ):
        parameter.grad = grad
    compiled(x).sum().backward()
    refused(optimizer, "p.grad already held a gradient of unknown origin")


def test_stale_gradient_in_place_of_a_release():
    model, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    compiled(samples()).sum().backward()
    refused(optimizer, "p.grad already held a gradient of unknown origin")


def test_stale_gradient_under_two_releases():
    """The first fault is the one to name, also when it is settled only at the second backward."""
    model, compiled, optimizer = setup()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    compiled(samples()).sum().backward()
    compiled(samples()).sum().backward()
    message = refused(optimizer, "p.grad already held a gradient of unknown origin")
    assert ACCUMULATED not in message


def test_gradients_that_were_refused_before():
    (first, run_first, alone), (second, run_second, _) = setup(), setup(mlp(6))
    both = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    run_first(samples()).sum().backward()
    run_second(samples()).sum().backward()
    kept = [parameter.grad for parameter in first.parameters()]
    refused(both, BACKWARDS)
    for parameter, grad in zip(first.parameters(), kept, strict=True):
        parameter.grad = grad
    refused(alone)


def test_stale_gradient_after_zeroing_in_place():
    model, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    accepted(optimizer)
    optimizer.zero_grad(set_to_none=False)
    model(samples()).sum().backward()
    compiled(samples()).sum().backward()
    refused(optimizer, PLAIN)


def test_plain_backward_whose_gradient_is_zero():
    model, compiled, optimizer = setup()
    compiled_step(compiled, optimizer)
    (model(samples()).sum() * 0).backward()
    refused(optimizer, PLAIN)


@pytest.mark.parametrize("after", ["nothing", "release", "step", "zero_grad"])
def test_gradient_assigned_by_hand(after):
    model, compiled, optimizer = setup()
    x = samples()
    if after != "nothing":
        compiled(x).sum().backward()
    if after == "step":
        accepted(optimizer)
    if after == "zero_grad":
        optimizer.zero_grad()
    grads = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    refused(optimizer, PLAIN if after == "nothing" else REPLACED)


def test_gradient_assigned_by_hand_through_the_compiled_graph():
    """autograd.grad runs the compiled backward and our hooks, but what is assigned later has no receipt."""
    model, compiled, optimizer = setup()
    torch.autograd.grad(compiled(samples()).sum(), list(model.parameters()))
    model(samples()).sum().backward()
    refused(optimizer)


def test_plain_closure():
    model, compiled, _ = setup()
    compiled(samples()).sum().backward()
    for optimizer in (torch.optim.LBFGS(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)):

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(samples()).sum()
            loss.backward()
            return loss

        refused(optimizer, PLAIN, "after its closure was evaluated", closure=closure)
        with pytest.raises(UnprotectedGradientError):
            optimizer.step(closure=closure)


def test_closure_that_the_optimizer_ignores():
    class Stubborn(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter -= parameter.grad

    model, compiled, _ = setup()
    compiled(samples()).sum().backward()
    optimizer = Stubborn(model.parameters())
    optimizer.zero_grad()
    model(samples()).sum().backward()
    refused(optimizer, PLAIN, closure=lambda: None)


def test_backward_before_a_reset():
    model, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    torch._dynamo.reset()
    refused(optimizer, "cleared by torch._dynamo.reset()")


def test_plain_backward_after_a_reset():
    model, compiled, optimizer = setup()
    compiled_step(compiled, optimizer)
    torch._dynamo.reset()
    model(samples()).sum().backward()
    refused(optimizer, PLAIN)


def test_compiled_step():
    """The check also stands before an optimizer step that is itself compiled, and is not traced into it."""
    model, compiled, optimizer = setup()
    step = torch.compile(optimizer.step, backend="eager")
    compiled(samples()).sum().backward()
    step()
    optimizer.zero_grad()
    model(samples()).sum().backward()
    with pytest.raises(Exception, match="flashdp refused this optimizer step"):
        step()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_plain_gradient_made_within_a_step():
    """A step within a step may use the release of the outer one, and nothing else."""
    torch.optim.SGD([torch.zeros(1)])
    model, compiled, _ = setup()

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            self.zero_grad()
            with torch.enable_grad():
                model(samples()).sum().backward()
            return super().step(closure)

    optimizer = Twice(model.parameters(), lr=0.1)
    compiled(samples()).sum().backward()
    refused(optimizer, "not made by a backward that flashdp compiled")
