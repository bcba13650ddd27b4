"""Modes of training around one model: precision, scaled losses, recomputation, lengths that vary.

Gradients are those of a loop over samples under the same mode.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import mark_dynamic
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flashdp_compile import sequence_losses
from reference import release
from zoo.training import gradients

BOUND = 0.2
KEPT = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))


class Recomputed(nn.Module):
    """Keeps the results of matrix products and computes the others again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(3, 3)

    def forward(self, x):
        keep = functools.partial(create_selective_checkpoint_contexts, KEPT)
        return self.head(checkpoint(self.body, x, use_reentrant=False, context_fn=keep))


class Attention(nn.Module):
    """A small causal language model."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.norm, self.head = (
            nn.Embedding(11, 16),
            nn.Linear(16, 48),
            nn.LayerNorm(16),
            nn.Linear(16, 11),
        )

    def forward(self, ids):
        x = self.table(ids)
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return self.head(self.norm(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]))


def compiled(model: nn.Module, **options) -> nn.Module:
    options = {"max_grad_norm": BOUND, "noise_multiplier": 0.0, "compiler": "eager", **options}
    return torch.compile(model, backend="flashdp", fullgraph=True, options=options)


def classes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).float(), y, reduction="none")


def exact(model: nn.Module, losses, *data: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is released, by a loop over samples in the precision of the mode; float32 sums."""
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    found = []
    for b in range(len(data[0])):
        loss = losses(model, *(t[b : b + 1] for t in data)).sum()
        found.append([g.float() for g in torch.autograd.grad(loss, list(named.values()))])
    samples = {name: torch.stack(own) for name, own in zip(named, zip(*found, strict=True), strict=True)}
    return release(samples, max_grad_norm=BOUND).gradients


def error(model: nn.Module, expected: dict[str, torch.Tensor]) -> float:
    """The largest, relative to a parameter's own gradient or a hundredth of the whole."""
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    found = gradients(model)
    return max(float((found[n].float() - g).norm() / g.norm().clamp(min=whole / 100)) for n, g in expected.items())


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 8), torch.randint(0, 3, (4,))


def test_weights_in_bfloat16():
    model, (x, y) = mlp().bfloat16(), batch()
    expected = exact(model, classes, x.bfloat16(), y)
    classes(compiled(model), x.bfloat16(), y).mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert error(model, expected) < 2e-2


def test_float16_with_a_scale_that_stays():
    """The bound is of what is clipped, the gradients of the scaled loss: it is scaled as well (docs/privacy.md)."""
    scale = 2.0**10
    model, (x, y) = mlp(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2**31 - 1)

    def losses(model, x, y):
        with torch.autocast("cpu", torch.float16):
            return classes(model, x, y)

    expected = exact(model, losses, x, y)
    scaler.scale(losses(compiled(model, max_grad_norm=BOUND * scale), x, y).mean()).backward()
    scaler.unscale_(optimizer)
    assert error(model, expected) < 5e-3
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale


def test_selective_recomputation():
    model, (x, y) = Recomputed(), batch()
    expected = exact(model, classes, x, y)
    classes(compiled(model), x, y).mean().backward()
    assert error(model, expected) < 1e-5


def test_several_losses_and_weights_of_samples():
    model, (x, y) = mlp(), batch()
    weights = torch.tensor([0.1, 2.0, 0.0, 5.0])

    def losses(model, x, y, w):
        out = model(x)
        return F.cross_entropy(out, y, reduction="none") * w + 0.3 * out.square().mean(1)

    expected = exact(model, losses, x, y, weights)
    out = compiled(model)(x)
    first = (F.cross_entropy(out, y, reduction="none") * weights).mean()
    (first + 0.3 * out.square().mean()).backward()
    assert error(model, expected) < 1e-5


def test_one_compilation_serves_all_batches_and_lengths():
    model = Attention()
    module = compiled(model)
    counters.clear()
    for size, length in ((4, 6), (4, 9), (3, 7), (5, 12), (2, 5)):
        ids = torch.randint(0, 11, (size, length))
        mark_dynamic(ids, 0)
        mark_dynamic(ids, 1)
        expected = exact(model, lambda model, ids: sequence_losses(model(ids), ids), ids)
        model.zero_grad()
        sequence_losses(module(ids), ids).mean().backward()
        assert error(model, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def test_keys_of_a_state_are_those_of_a_model_that_is_compiled_by_inductor():
    model = mlp()
    private, plain = compiled(model), torch.compile(model)
    assert list(private.state_dict()) == list(plain.state_dict())
    private.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("module, data, word", [
    (nn.Sequential(nn.Embedding(7, 8, sparse=True), nn.Flatten()), torch.randint(0, 7, (4, 2)), "use sparse=False"),
    (nn.Linear(4, 3, dtype=torch.complex64), torch.randn(4, 4, dtype=torch.complex64), "complex"),
])  # fmt: skip
def test_sparse_and_complex_gradients_are_refused(module, data, word):
    from flashdp_compile import Refusal

    with pytest.raises(Refusal, match=word):
        compiled(module)(data).abs().sum(1).mean().backward()
    assert all(p.grad is None for p in module.parameters())
