"""The facts about autograd that receipts rest on, and what they cost in memory."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from flashdp_compile.errors import FlashDPError
from flashdp_compile.runtime import check, guard, release, watch
from runtime.stand_in import accepted, backend, mlp, refused, samples, setup


def test_the_released_gradient_is_taken_not_copied():
    """A hook that kept a reference would make AccumulateGrad copy: twice the memory for gradients."""
    pointers = {}

    def spying(graph, example_inputs):
        inner = backend(graph, example_inputs)

        def run(*args):
            outputs = inner(*args)

            def spy(grad_inputs, grad_outputs):
                pointers.update((grad.data_ptr(), grad.shape) for grad in grad_inputs if grad is not None)

            outputs[0].grad_fn.register_hook(spy)
            return outputs

        return run

    model = mlp()
    torch.compile(model, backend=spying)(samples()).sum().backward()
    assert [pointers.get(p.grad.data_ptr()) for p in model.parameters()] == [p.shape for p in model.parameters()]


def test_gradients_are_freed_by_zero_grad():
    model, compiled, optimizer = setup()
    compiled(samples()).sum().backward()
    grads = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    accepted(optimizer)
    optimizer.zero_grad()
    assert all(grad() is None for grad in grads)


def test_dropped_models_are_collected():
    def train():
        model, compiled, optimizer = setup()
        compiled(samples()).sum().backward()
        accepted(optimizer)
        compiled(samples()).sum().backward()
        refused(optimizer)
        return [weakref.ref(one) for one in (model, optimizer, *model.parameters())]

    references = train()
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in references] == [None] * 6


def test_public_optimizers_are_collected():
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    optimizer.step()
    assert optimizer in check._public
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None


def test_hooks_are_registered_once():
    model, compiled, optimizer = setup()
    for _ in range(3):
        optimizer.zero_grad()
        compiled(samples()).sum().backward()
        optimizer.step()
    assert [len(p._backward_hooks) for p in model.parameters()] == [1] * 4
    assert [len(p._post_accumulate_grad_hooks) for p in model.parameters()] == [1] * 4


def test_install_is_idempotent():
    before = list(_global_optimizer_pre_hooks.values())
    guard.install()
    assert list(_global_optimizer_pre_hooks.values()) == before
    assert before.count(check.before_step) == 1


def test_receipts_hold_one_release_each():
    """Two backward passes over disjoint parameters: each receipt names its own."""
    (first, run_first, _), (second, run_second, _) = setup(), setup(mlp(6))
    run_first(samples()).sum().backward()
    run_second(samples()).sum().backward()
    numbers = [{watch.find(p).content.release.number for p in model.parameters()} for model in (first, second)]
    assert len(numbers[0]) == len(numbers[1]) == 1
    assert numbers[1].pop() == numbers[0].pop() + 1 == guard.releases()


def test_backward_in_another_thread():
    model, compiled, optimizer = setup()
    for _ in range(3):
        optimizer.zero_grad()
        loss = compiled(samples()).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        accepted(optimizer)


def test_many_threads_number_their_releases_apart():
    """Each thread has its own backward pass: no release may take another's for one of its own."""
    ledger, found = release.Ledger(), []

    def work():
        found.extend(ledger.open(guard.ReleaseInfo(label="")) for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.number for one in found) == list(range(1, 801))
    assert all(one.peers == [one] for one in found)


def test_protected_before_compilation():
    """A parameter that the backend has named stays protected although nothing was ever compiled."""
    model = mlp()
    guard.protect({f"net.{name}": parameter for name, parameter in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(samples()).sum().backward()
    refused(optimizer, "net.0.weight, net.0.bias")


def test_frozen_parameters_may_be_protected():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    guard.protect({"frozen": frozen})
    assert watch.find(frozen) is None


def test_not_a_release_without_parameters():
    frozen = mlp().requires_grad_(False)
    before = guard.releases()
    torch.compile(frozen, backend=backend)(samples().requires_grad_()).sum().backward()
    assert guard.releases() == before


@pytest.mark.parametrize("grad", [True, False])
def test_wrapped_function_returns_what_it_got(grad):
    outputs = (samples().requires_grad_() * 2, None, 3)
    wrapped = guard.wrap(lambda *args: outputs, guard.ReleaseInfo(label="x"))
    with torch.set_grad_enabled(grad):
        assert wrapped(1) is outputs


def test_a_graph_without_the_gradient_of_a_thawed_parameter_is_not_run():
    calls, frozen, trained = [], nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    wrapped = guard.wrap(lambda *args: calls.append(args) or (), guard.ReleaseInfo(label="x"), {1: "net.scale"})
    wrapped(trained, frozen)
    frozen.requires_grad_(True)
    with torch.no_grad():
        wrapped(trained, frozen)
    assert len(calls) == 2
    with pytest.raises(FlashDPError, match=r"net\.scale required no gradient"):
        wrapped(trained, frozen)
    assert len(calls) == 2
