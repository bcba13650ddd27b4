"""Models around the compiled step: several of them, shared code, inference, inputs of all forms, new shapes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import flashdp_compile
from flashdp_compile import FlashDPError
from zoo import CASES, Model
from zoo.training import compiled_gradients

EAGER = {"compiler": "eager", "noise_multiplier": 0.0}


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = self.drop(self.a(x).tanh())
        return self.b(hidden if scale is None else hidden * scale[:, None])


def compiled(model, **options):
    return torch.compile(model, backend="flashdp", fullgraph=True, options={**EAGER, **options})


def without_dropout(*seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        model = Net()
        model.drop.p = 0.0
        yield model


def reference(model, x, bound, scale=None):
    """{name: mean of clipped gradients}, sample by sample in float64."""
    exact = copy.deepcopy(model).double()
    parameters = dict(exact.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(x)):
        own = {} if scale is None else {"scale": scale[i : i + 1].double()}
        loss = exact(x[i : i + 1].double(), **own).square().sum()
        grads = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for name, g in zip(parameters, grads, strict=True):
            total[name] += g * min(1.0, bound / float(norm)) / len(x)
    return total


def assert_exact(model, expected):
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def backward(module, x, **more):
    module(x, **more).square().sum(1).mean().backward()


def test_two_models_with_different_options():
    """Steps alternate; each keeps its own bound, and an optimizer each."""
    (one, two), x = without_dropout(1, 2), torch.randn(5, 3)
    modules = compiled(one, max_grad_norm=0.05), compiled(two, max_grad_norm=0.2, clip_fn="hard")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, two)]
    for _ in range(2):
        for model, module, optimizer, bound in zip((one, two), modules, optimizers, (0.05, 0.2), strict=True):
            expected = reference(model, x, bound)
            backward(module, x)
            assert_exact(model, expected)
            optimizer.step()
            optimizer.zero_grad()


def test_one_class_compiled_twice_with_the_same_options():
    (one, two), x = without_dropout(1, 2), torch.randn(5, 3)
    modules = compiled(one, max_grad_norm=0.05), compiled(two, max_grad_norm=0.05)
    expected = [reference(m, x, 0.05) for m in (one, two)]
    for module in modules:
        backward(module, x)
    assert_exact(one, expected[0])
    assert_exact(two, expected[1])


def test_one_model_compiled_with_two_sets_of_options():
    (model,), x = without_dropout(1), torch.randn(5, 3)
    modules = {bound: compiled(model, max_grad_norm=bound) for bound in (0.05, 0.2)}
    for bound in (0.05, 0.2, 0.05, 0.2):
        model.zero_grad()
        backward(modules[bound], x)
        assert_exact(model, reference(model, x, bound))


def test_a_function_called_with_two_models_shares_its_code():
    calls = []

    def counting(gm, inputs, **kwargs):
        calls.append(gm)
        return flashdp_compile.backend(gm, inputs, **kwargs)

    def step(model, x):
        return model(x)

    (one, two), x = without_dropout(1, 2), torch.randn(5, 3)
    options = {**EAGER, "max_grad_norm": 0.05}
    call = torch.compile(step, backend=counting, fullgraph=True, options=options)
    for model in (one, two, one):
        model.zero_grad()
        call(model, x).square().sum(1).mean().backward()
        assert_exact(model, reference(model, x, 0.05))
    assert 1 <= len(calls) <= 2


def test_identical_blocks_of_one_model():
    """Dynamo may compile a block once and run it for all: each parameter still gets its own gradient."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x).tanh()
            return x

    model, x = Stack(), torch.randn(5, 3)
    backward(compiled(model, max_grad_norm=0.1), x)
    assert_exact(model, reference(model, x, 0.1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_are_those_of_the_plain_model(context, training):
    """Dropout is off in evaluation; in training it has no part here, as compiled code draws other masks."""
    (model,), x = without_dropout(1) if training else (Net(),), torch.randn(5, 3)
    module = compiled(model).train(training)
    with context():
        assert torch.allclose(module(x), model(x), atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_eval_and_train_take_turns():
    """An evaluation between steps neither clips, noises nor counts as a release."""
    (model,), x = without_dropout(1), torch.randn(5, 3)
    module = compiled(model, max_grad_norm=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        module.eval()
        with torch.no_grad():
            assert torch.allclose(module(x), model(x), atol=1e-6)
        module.train()
        expected = reference(model, x, 0.05)
        backward(module, x)
        assert_exact(model, expected)
        optimizer.step()
        optimizer.zero_grad()


def test_batch_norm_in_eval_mode_is_accepted():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    backward(compiled(model, max_grad_norm=0.05), x)
    assert_exact(model, reference(model, x, 0.05))


def test_keyword_inputs():
    (model,), x, scale = without_dropout(1), torch.randn(5, 3), torch.rand(5)
    backward(compiled(model, max_grad_norm=0.05), x, scale=scale)
    assert_exact(model, reference(model, x, 0.05, scale))


def test_inputs_and_outputs_in_dicts_and_tuples():
    (net,), x, scale = without_dropout(1), torch.randn(5, 3), torch.rand(5)
    model = Model(lambda m, batch: {"out": (m.net(batch["x"], batch["more"][0]), batch["x"])}, net=net)
    module = compiled(model, max_grad_norm=0.05)
    module({"x": x, "more": (scale,)})["out"][0].square().sum(1).mean().backward()
    assert_exact(net, reference(net, x, 0.05, scale))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    (model,), x = without_dropout(1), torch.randn(5, 3)
    module = compiled(model, max_grad_norm=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        expected = reference(model, x, 0.05)
        backward(module, x)
        assert_exact(model, expected)
        optimizer.step()


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_new_shapes(dynamic):
    (model,) = without_dropout(1)
    options = {**EAGER, "max_grad_norm": 0.05}
    module = torch.compile(model, backend="flashdp", fullgraph=True, dynamic=dynamic, options=options)
    for batch in (5, 3, 8, 1):
        x = torch.randn(batch, 3)
        model.zero_grad()
        backward(module, x)
        assert_exact(model, reference(model, x, 0.05))


def test_gradients_of_inputs_are_left_alone():
    """They belong to their samples: neither clipped nor noised."""
    (model,), x = without_dropout(1), torch.randn(5, 3, requires_grad=True)
    backward(compiled(model, max_grad_norm=1e-3, noise_multiplier=5.0), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(1).mean(), x)
    assert torch.allclose(x.grad, expected, atol=1e-6)


# Without this setting, torch 2.11 does not see a change of requires_grad of a parameter that it has guarded before.
GUARD_ALL = {"skip_tensor_guards_with_matching_dict_tags": False}


def thaw(compiler="eager"):
    """A model compiled with its first layer frozen, that layer thawed since, and samples."""
    (model,), x = without_dropout(1), torch.randn(5, 3)
    module = compiled(model, max_grad_norm=0.05, compiler=compiler)
    model.a.requires_grad_(False)
    backward(module, x)
    assert model.a.weight.grad is None
    model.a.requires_grad_(True)
    model.zero_grad()
    return model, module, x


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_frozen_parameter_that_thaws(compiler):
    """Where dynamo guards requires_grad, the change compiles again, with the new parameter clipped."""
    with torch._dynamo.config.patch(GUARD_ALL):
        model, module, x = thaw(compiler)
        backward(module, x)
    assert_exact(model, reference(model, x, 0.05))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_thaw_that_torch_does_not_see(compiler):
    """By default, torch 2.11 runs the graph without the parameter's gradient: that call is refused until a reset."""
    model, module, x = thaw(compiler)
    if torch.__version__ < (2, 12):
        with pytest.raises(FlashDPError, match=r"when a.weight, a.bias required no gradient(.|\n)*compiler.reset\(\)"):
            module(x)
        with torch.no_grad():
            assert torch.allclose(module(x), model(x), atol=1e-6)
        torch.compiler.reset()
    backward(module, x)
    assert_exact(model, reference(model, x, 0.05))


def test_a_product_of_broadcast_tensors_in_16_bits():
    """torch computes it with other strides than it traces, so the interpreter may not take views of it by the trace."""
    case = CASES["weight_per_time_step"]
    model, batch = case.model().bfloat16(), case.batch(case.batch_sizes[0]).to(torch.bfloat16)
    for clipping in ("flat", "per_layer"):
        found = compiled_gradients(case, model, batch, "inside", clipping=clipping, **EAGER)
        assert all(gradient.isfinite().all() for gradient in found.values())
