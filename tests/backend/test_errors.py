"""What the user catches: our own errors, unwrapped, from the compiled call, with and without fullgraph."""

import pytest
import torch
from torch import nn

from flashdp_compile import FlashDPError, InputError, OptionError, Refusal, UnprotectedGradientError
from zoo import Model

EAGER = {"compiler": "eager", "noise_multiplier": 0.0}
both = pytest.mark.parametrize("fullgraph", [True, False])

OPTIONS = {
    "max_grad_nrom": (1.0, "max_grad_norm"),
    "max_grad_norm": (0.0, "greater than 0"),
    "noise_multiplier": (float("nan"), "finite"),
    "clipping": ("per_leyer", "per_layer"),
    "clip_fn": ("soft", "'hard'"),
    "expected_batch_size": (0, "1 or greater"),
    "inductor": ({"joint_custom_pre_pass": print}, "not allowed"),
    "mode": ("fast", "reduce-overhead"),
}


@both
@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, fullgraph):
    value, text = OPTIONS[name]
    model = nn.Linear(3, 2)
    with pytest.raises(OptionError, match=name) as caught:
        torch.compile(model, backend="flashdp", fullgraph=fullgraph, options={**EAGER, name: value})(torch.randn(4, 3))
    assert type(caught.value) is OptionError and isinstance(caught.value, FlashDPError)
    assert text in str(caught.value)


REFUSED = {
    "centring": (Model(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(3, 2)), "x.mean", Refusal),
    "batch norm": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "norm", Refusal),
    "roll": (Model(lambda m, x: m.a(x).roll(1, 0), a=nn.Linear(3, 2)), "roll", Refusal),
    "softmax": (Model(lambda m, x: m.a(x).softmax(0), a=nn.Linear(3, 2)), "softmax", Refusal),
}


@both
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, fullgraph):
    model, text, kind = REFUSED[name]
    model.zero_grad()
    with pytest.raises(FlashDPError, match=text) as caught:
        torch.compile(model, backend="flashdp", fullgraph=fullgraph, options=EAGER)(torch.randn(4, 3))
    assert type(caught.value) is kind
    assert all(p.grad is None for p in model.parameters())


@both
def test_a_refused_model_that_is_run_anyway_cannot_step(fullgraph):
    """The error is caught and the plain model trained on: the parameters are already known as protected."""
    model = Model(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(3, 2))
    with pytest.raises(Refusal):
        torch.compile(model, backend="flashdp", fullgraph=fullgraph, options=EAGER)(torch.randn(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(UnprotectedGradientError, match="a.weight"):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())


@both
def test_inputs_of_unequal_batch_size(fullgraph):
    """The error names the input, and the name is what public_inputs takes."""

    class Masked(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x) * mask

    model = Masked(3, 2)
    with pytest.raises(InputError, match="'mask'.*public_inputs"):
        torch.compile(model, backend="flashdp", fullgraph=fullgraph, options=EAGER)(torch.randn(4, 3), torch.ones(2))
    options = {**EAGER, "public_inputs": ["mask"]}
    module = torch.compile(model, backend="flashdp", fullgraph=fullgraph, options=options)
    module(torch.randn(4, 3), torch.ones(2)).sum(1).mean().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["batch norm", "copy"])
def test_a_buffer_that_is_updated_from_samples(kind, batch):
    """Running statistics would leave the step without noise, from a batch of one most of all."""

    def copying(m, x):
        m.seen.copy_(x.detach().mean(0))
        return m.a(x)

    if kind == "copy":
        model, x = Model(copying, a=nn.Linear(3, 2), seen=torch.zeros(3)), torch.randn(batch, 3)
    else:
        model, x = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)), torch.randn(batch, 2, 5)
    with pytest.raises(Refusal):
        torch.compile(model, backend="flashdp", fullgraph=True, options=EAGER)(x)


HOOKS = (
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
    "custom_partitioner_fn",
)


@pytest.mark.parametrize("name", HOOKS)
def test_passes_of_others_are_refused(name):
    """Set in the process, where options do not see them; they run after the proof."""
    from torch._inductor import config

    with config.patch({name: lambda *args: None}), pytest.raises(Refusal, match=name):
        torch.compile(nn.Linear(3, 2), backend="flashdp", options=EAGER)(torch.randn(4, 3))


@pytest.mark.parametrize("name", [*HOOKS, "triton_kernel_default_layout_constraint"])
def test_what_could_undo_the_proof_is_not_taken_as_an_option(name):
    with pytest.raises(OptionError, match=name):
        torch.compile(nn.Linear(3, 2), backend="flashdp", options={"inductor": {name: print}})(torch.randn(4, 3))
