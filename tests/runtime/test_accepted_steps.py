"""What must keep working: ordinary training loops of every kind, and models that have nothing to do with flashdp."""

import copy
import io

import pytest
import torch
from torch import nn

from flashdp_compile.runtime import guard
from runtime.stand_in import accepted, backend, mlp, refused, samples, setup


@pytest.mark.parametrize("when", ["before", "after"])
def test_training_loop(when):
    model = mlp()
    if when == "before":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend)
    if when == "after":
        optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    before = guard.releases()
    for _ in range(4):
        optimizer.zero_grad()
        compiled(samples()).sum().backward()
        accepted(optimizer)
    assert guard.releases() == before + 4


def test_evaluation_between_steps():
    model, compiled, optimizer = setup()
    for _ in range(2):
        optimizer.zero_grad()
        loss = compiled(samples()).sum()
        with torch.no_grad():
            compiled(samples())
            model(samples())
        loss.backward()
        torch.autograd.grad(model(samples()).sum(), list(model.parameters()))  # looked at, not stepped on
        accepted(optimizer)


def test_zeroing_in_place():
    _, compiled, optimizer = setup()
    for _ in range(3):
        compiled(samples()).sum().backward()
        accepted(optimizer)
        optimizer.zero_grad(set_to_none=False)


def test_zeroing_in_place_makes_up_for_a_plain_backward():
    model, compiled, optimizer = setup()
    model(samples()).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    compiled(samples()).sum().backward()
    accepted(optimizer)


def test_parameter_without_gradient_after_zeroing_in_place():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x, left: bool):
            return self.left(x) if left else self.right(x)

    _, compiled, optimizer = setup(Branches())
    for left in (True, False, True):
        compiled(samples(), left).sum().backward()
        accepted(optimizer)
        optimizer.zero_grad(set_to_none=False)


def test_frozen_and_unused_parameters():
    model = mlp()
    model.extra = nn.Parameter(torch.ones(2))  # never used: no gradient
    model[0].weight.requires_grad_(False)
    _, compiled, optimizer = setup(model)
    compiled(samples()).sum().backward()
    accepted(optimizer)
    optimizer.zero_grad()
    model[0].weight.requires_grad_(True)  # thawed: compiled again, then protected like the others
    compiled(samples()).sum().backward()
    accepted(optimizer)
    optimizer.zero_grad()
    model(samples()).sum().backward()
    refused(optimizer, names=["0.weight, 0.bias"])


def test_no_gradients_at_all():
    _, compiled, optimizer = setup()
    compiled(samples())
    optimizer.step()


def test_gradients_changed_in_place():
    model, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    for parameter in model.parameters():
        parameter.grad.mul_(2)
    torch._foreach_mul_([parameter.grad for parameter in model.parameters()], 0.5)
    accepted(optimizer)


def test_grad_scaler():
    model, compiled, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(compiled(samples()).sum()).backward()
        scaler.unscale_(optimizer)
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(model[0].weight, before)


def test_scheduler():
    _, compiled, optimizer = setup()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(samples()).sum().backward()
        accepted(optimizer)
        scheduler.step()


def test_lbfgs():
    model, compiled, _ = setup()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, evaluations = samples(), []

    def closure():
        optimizer.zero_grad()
        loss = compiled(x).square().sum()
        loss.backward()
        evaluations.append(loss)
        return loss

    for _ in range(2):
        accepted(optimizer, closure)
    assert len(evaluations) > 4


@pytest.mark.parametrize("as_keyword", [True, False])
def test_closure_of_an_ordinary_optimizer(as_keyword):
    _, compiled, optimizer = setup()

    def closure():
        optimizer.zero_grad()
        loss = compiled(samples()).sum()
        loss.backward()
        return loss

    for _ in range(2):
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss.requires_grad


def test_two_optimizers_over_one_model():
    model, compiled, _ = setup()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[2].parameters(), lr=0.1)
    for _ in range(2):
        compiled(samples()).sum().backward()
        accepted(first)
        first.zero_grad()
        accepted(second)
        second.zero_grad()


def test_optimizer_that_steps_during_the_backward():
    """The per-parameter pattern, its hooks registered after the parameters are known."""
    model, compiled, _ = setup()
    guard.protect(dict(model.named_parameters()))
    optimizers = {}

    def step_now(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        optimizers[parameter] = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(step_now)
    before = model[0].weight.detach().clone()
    compiled(samples()).sum().backward()
    assert not torch.equal(model[0].weight, before)


def test_two_models_with_an_optimizer_each():
    for model, compiled, optimizer in [setup(), setup(mlp(6))]:
        compiled(samples()).sum().backward()
        accepted(optimizer)
        optimizer.zero_grad()
        del model


def test_public_models_are_left_alone():
    _, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    accepted(optimizer)
    for public, run in [(mlp(), None), (mlp(6), "eager"), (mlp(5), "aot_eager")]:
        other = torch.optim.Adam(public.parameters())
        call = torch.compile(public, backend=run) if run else public
        for _ in range(2):
            for _ in range(2):
                call(samples()).sum().backward()
            accepted(other)
            other.zero_grad()
        assert all(not parameter._backward_hooks for parameter in public.parameters())


def test_public_compiled_model_in_front():
    """Its compiled node is in the history of what our graph returns, and must not be taken for ours."""
    front, (model, _, optimizer) = mlp(), setup(nn.Linear(1, 1))
    hidden = torch.compile(front, backend="aot_eager")(samples())
    optimizer.add_param_group({"params": front.parameters()})
    through = torch.compile(lambda h: (h.view(-1), model(h).sum()), backend=backend)
    alias, loss = through(hidden)
    (alias.sum() + loss).backward()
    message = refused(optimizer, "not made by a backward that flashdp compiled")
    assert "weight" not in message  # the model's own gradient is a release, that of the public one in front is plain


def test_outputs_that_are_views():
    model = mlp()

    def forward(x):
        out = model(x)
        return out.view(-1), out.t(), x.view(-1)

    compiled = torch.compile(forward, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flat, turned, _ = compiled(samples())
    (flat.sum() + turned.sum()).backward()
    accepted(optimizer)


def test_tied_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    _, compiled, optimizer = setup(model)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(samples()).sum().backward()
        accepted(optimizer)


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"]
)
def test_optimizers(name):
    model, compiled, optimizer = setup(optimizer=getattr(torch.optim, name))
    for _ in range(2):
        optimizer.zero_grad()
        compiled(samples()).sum().backward()
        accepted(optimizer)
    optimizer.zero_grad()
    model(samples()).sum().backward()
    refused(optimizer)


def test_no_recompilation():
    """The hooks that the first call puts on the parameters are no reason to compile again."""
    model = mlp()
    compilations = []

    def counting(graph, example_inputs):
        compilations.append(graph)
        return backend(graph, example_inputs)

    compiled = torch.compile(model, backend=counting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = samples()
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).sum().backward()
        accepted(optimizer)
    assert len(compilations) == 1


@pytest.mark.filterwarnings("error")
def test_models_are_copied_and_saved_as_ever():
    model, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    accepted(optimizer)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    clone = copy.deepcopy(model)
    for other in (loaded, clone):
        assert all(not parameter._backward_hooks for parameter in other.parameters())
        other(samples())
    model.load_state_dict(clone.state_dict())
    model.double().float()
    compiled(samples()).sum().backward()


def test_backward_under_a_compiler_of_other_code():
    """Dynamo is then watching while autograd calls our hooks, and must leave them alone."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend)

    @torch.compile(backend="eager")
    def finish(loss):
        loss.backward()
        optimizer.step()
        return loss * 2

    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        finish(compiled(samples()).sum())
    assert not torch.equal(model[0].weight, before)


class Subclass(torch.optim.SGD):
    """Torch wraps the step of both classes, and each wrapper calls the hook."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_the_step_of_its_base(closure):
    torch.optim.SGD([torch.zeros(1)])  # wraps the step of the base, too
    model = mlp()
    compiled, optimizer = torch.compile(model, backend=backend), Subclass(model.parameters(), lr=0.1)

    def evaluate():
        optimizer.zero_grad()
        loss = compiled(samples()).sum()
        loss.backward()
        return loss

    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            accepted(optimizer)
        assert not any(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    refused(optimizer, "the release of an earlier step")
