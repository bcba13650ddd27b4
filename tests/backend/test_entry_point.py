"""By name, without an import; without options; as a function; by module.compile."""

import functools

import pytest
import torch
from torch import nn

import flashdp_compile
from backend.processes import run
from flashdp_compile.options import _log_once
from zoo import Model

EAGER = {"compiler": "eager", "noise_multiplier": 0.0}


def test_by_name_in_a_process_that_never_imports_flashdp():
    """With no options: one line in the log says what was taken, and the gradient is noised."""
    done = run(
        """
        import sys, torch
        from torch import nn
        torch.manual_seed(0)
        assert "flashdp" in torch._dynamo.list_backends()
        assert not any(name.startswith("flashdp_compile") for name in sys.modules)
        model = nn.Linear(3, 1, bias=False)
        module = torch.compile(model, backend="flashdp", fullgraph=True)
        x = torch.zeros(4, 3)
        # the options are what is tested here: Inductor itself is spared
        from flashdp_compile import compat
        compat.compile_with_inductor = lambda gm, inputs, joint_pass, *rest: compat.compile_with_interpreter(
            gm, inputs, joint_pass
        )
        for _ in range(2):
            module(x).sum(1).mean().backward()
            assert model.weight.grad.any()
            model.zero_grad()
            module(torch.zeros(5, 3)).sum(1).mean().backward()
            model.zero_grad()
        """
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "flashdp" in line]
    assert len(lines) == 1, done.stderr
    for text in ("max_grad_norm=1.0", "noise_multiplier=1.0", "clipping=flat", "the batch's own size"):
        assert text in lines[0]


@pytest.mark.parametrize("module, name", [("dynamo_backend", "backend"), ("explanation", "explain")])
def test_public_names_survive_imports_of_submodules(module, name):
    """A submodule becomes an attribute of its package when it is imported: it must not take a public name."""
    done = run(f"import flashdp_compile.{module}\nassert not isinstance(flashdp_compile.{name}, type(flashdp_compile))")
    assert done.returncode == 0, done.stderr


def test_no_options_log_their_values_once(caplog):
    _log_once.cache_clear()
    for _ in range(3):
        flashdp_compile.Options.parse(None)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "no options given" in caplog.text


def clipped(model, call, x):
    """Whether the gradient of one huge sample has the length of the default bound."""
    model.zero_grad()
    call(x).sum(1).mul(torch.eye(len(x))[0]).sum().backward()
    length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    return abs(float(length) * len(x) - 1) < 1e-2


WAYS = {
    "by name": lambda model: torch.compile(model, backend="flashdp", fullgraph=True, options=EAGER),
    "by function": lambda model: torch.compile(model, backend=flashdp_compile.backend, options=EAGER),
    "by partial": lambda model: torch.compile(model, backend=functools.partial(flashdp_compile.backend, options=EAGER)),
    "decorator": lambda model: torch.compile(backend="flashdp", options=EAGER)(lambda x: model(x)),
    "function of a module": lambda model: functools.partial(
        torch.compile(lambda m, x: 2 * m(x), backend="flashdp", fullgraph=True, options=EAGER), model
    ),
    "bound method": lambda model: torch.compile(model.forward, backend="flashdp", options=EAGER),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compile(way):
    model = Model(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    call, x = WAYS[way](model), 1e3 * torch.randn(4, 3)
    loss = lambda x: 1e3 * call(x)  # noqa: E731
    assert not clipped(model, lambda x: 1e3 * model(x), x)
    assert clipped(model, loss, x)


def test_module_compile_in_place():
    model = Model(lambda m, x: m.a(x), a=nn.Linear(3, 2))  # torch never compiles the call of a bare nn.Linear
    names = list(model.state_dict())
    model.compile(backend="flashdp", fullgraph=True, options=EAGER)
    assert list(model.state_dict()) == names
    assert clipped(model, model, 1e3 * torch.randn(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.a.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.a.weight, before)


def test_state_dict_keys_are_those_of_plain_compile():
    model = Model(lambda m, x: m.a(x) + m.shift, a=nn.Linear(3, 2), shift=torch.zeros(2))
    ours = torch.compile(model, backend="flashdp", options=EAGER)
    plain = torch.compile(model, backend="eager")
    ours(torch.randn(2, 3)).sum(1).mean().backward()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert list(model.state_dict()) == ["shift", "a.weight", "a.bias"]
    fresh = Model(lambda m, x: m.a(x) + m.shift, a=nn.Linear(3, 2), shift=torch.zeros(2))
    fresh.load_state_dict(model.state_dict())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_are_accepted(mode):
    """As torch.compile's own argument, which excludes options, and inside of options."""
    assert flashdp_compile.Options.parse(None, mode).mode == mode
    model = nn.Linear(3, 2)
    call = torch.compile(model, backend="flashdp", options={**EAGER, "mode": mode})
    assert clipped(model, call, 1e3 * torch.randn(4, 3))


def test_explain_in_a_process_that_has_not_loaded_inductor():
    """The decomposition of max_pool2d uses a module of Inductor that it does not import."""
    done = run(
        """
        import torch, flashdp_compile
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.MaxPool2d(2))
        report = flashdp_compile.explain(model, torch.randn(3, 1, 6, 6), quiet=True)
        assert report.refusal is None
        """
    )
    assert done.returncode == 0, done.stderr
