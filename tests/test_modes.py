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
from found import what
from reference import gradients_one_by_one, release
from zoo import coverage
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


pytestmark = pytest.mark.parametrize("clipping", ["flat", "per_layer"])


def compiled(model: nn.Module, clipping: str, **options) -> nn.Module:
    options = {"clipping": clipping, "max_grad_norm": BOUND, "noise_multiplier": 0.0, "compiler": "eager", **options}
    return torch.compile(model, backend="flashdp", fullgraph=True, options=options)


def classes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).float(), y, reduction="none")


def exact(clipping: str, model: nn.Module, losses, *data: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is released, by a loop over samples in the precision of the mode; float32 sums."""
    model = copy.deepcopy(model)
    each = (losses(model, *(t[b : b + 1] for t in data)).sum() for b in range(len(data[0])))
    samples = {name: own.float() for name, own in gradients_one_by_one(model, each).items()}
    return release(samples, clipping=clipping, max_grad_norm=BOUND).gradients


def check(mode: str, clipping: str, model: nn.Module, expected: dict[str, torch.Tensor], allowed: float) -> None:
    """Errors are relative to a parameter's own gradient, or to a hundredth of the whole."""
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    found = gradients(model)
    error = max(float((found[n].float() - g).norm() / g.norm().clamp(min=whole / 100)) for n, g in expected.items())
    assert error < allowed
    coverage.mode(f"{mode}, {clipping}", f"exact, {error:.0e}")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 8), torch.randint(0, 3, (4,))


def test_weights_in_bfloat16(clipping):
    model, (x, y) = mlp().bfloat16(), batch()
    expected = exact(clipping, model, classes, x.bfloat16(), y)
    classes(compiled(model, clipping), x.bfloat16(), y).mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    check("bf16 weights", clipping, model, expected, 2e-2)


def test_float16_with_a_grad_scaler(clipping):
    """The bound is of the loss itself, whatever its scale, which may change without another compilation."""
    model, (x, y) = mlp(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2**31 - 1)

    share = torch.tensor([1.0, 0.01, 1.0, 0.01])  # two samples are clipped, and two are not

    def losses(model, x, y, share):
        with torch.autocast("cpu", torch.float16):
            return classes(model, x, y) * share

    private = compiled(model, clipping, grad_scaler=scaler)
    counters.clear()
    for scale in (2.0**10, 2.0**4, 2.0**12):
        optimizer.zero_grad()
        expected = exact(clipping, model, losses, x, y, share)
        assert any(g.norm() > BOUND / 10 for g in expected.values()), "the bound counts"
        scaler.scale(losses(private, x, y, share).mean()).backward()
        assert scaler.get_scale() == scale
        scaler.unscale_(optimizer)
        check(f"fp16 autocast, GradScaler at {scale:.0f}", clipping, model, expected, 5e-3)
        scaler.step(optimizer)
        scaler.update({2.0**10: 2.0**4, 2.0**4: 2.0**12}.get(scale))
    assert counters["stats"]["unique_graphs"] == 1


def test_the_noise_does_not_grow_with_the_scale(clipping):
    """Losses of zero, so that what is left after `unscale_` is the noise."""
    model, optimizer = nn.Linear(8, 4000, bias=False), None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2**31 - 1)
    options = {"noise_multiplier": 1.5, "expected_batch_size": 4, "grad_scaler": scaler}
    private = compiled(model, clipping, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler.scale((0 * private(torch.randn(4, 8)).sum(1)).mean()).backward()
    scaler.unscale_(optimizer)
    assert float(model.weight.grad.std()) == pytest.approx(1.5 * BOUND / 4, rel=0.03)


def test_selective_recomputation(clipping):
    model, (x, y) = Recomputed(), batch()
    expected = exact(clipping, model, classes, x, y)
    classes(compiled(model, clipping), x, y).mean().backward()
    check("selective recomputation", clipping, model, expected, 1e-5)


def test_recomputation_of_whole_blocks(clipping):
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(nn.Sequential(mlp(), nn.Linear(3, 8)) for _ in range(2)), mlp()

        def forward(self, x):
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    model, (x, y) = Blocks(), batch()
    expected = exact(clipping, model, classes, x, y)
    classes(compiled(model, clipping), x, y).mean().backward()
    check("recomputation of whole blocks", clipping, model, expected, 1e-5)


def test_several_losses_and_weights_of_samples(clipping):
    model, (x, y) = mlp(), batch()
    weights = torch.tensor([0.1, 2.0, 0.0, 5.0])

    def losses(model, x, y, w):
        out = model(x)
        return F.cross_entropy(out, y, reduction="none") * w + 0.3 * out.square().mean(1)

    expected = exact(clipping, model, losses, x, y, weights)
    out = compiled(model, clipping)(x)
    first = (F.cross_entropy(out, y, reduction="none") * weights).mean()
    (first + 0.3 * out.square().mean()).backward()
    check("several losses, weights of samples", clipping, model, expected, 1e-5)


def test_one_compilation_serves_all_batches_and_lengths(clipping):
    model = Attention()
    module = compiled(model, clipping)
    counters.clear()
    for size, length in ((4, 6), (4, 9), (3, 7), (5, 12), (2, 5)):
        ids = torch.randint(0, 11, (size, length))
        mark_dynamic(ids, 0)
        mark_dynamic(ids, 1)
        expected = exact(clipping, model, lambda model, ids: sequence_losses(model(ids), ids), ids)
        model.zero_grad()
        sequence_losses(module(ids), ids).mean().backward()
        check("any B and any T in one compilation", clipping, model, expected, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_keys_of_a_state_are_those_of_a_model_that_is_compiled_by_inductor(clipping):
    model = mlp()
    private, plain = compiled(model, clipping), torch.compile(model)
    assert list(private.state_dict()) == list(plain.state_dict())
    private.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("module, data, word", [
    (nn.Sequential(nn.Embedding(7, 8, sparse=True), nn.Flatten()), torch.randint(0, 7, (4, 2)), "use sparse=False"),
    (nn.Linear(4, 3, dtype=torch.complex64), torch.randn(4, 4, dtype=torch.complex64), "complex"),
])  # fmt: skip
def test_sparse_and_complex_gradients_are_refused(module, data, word, clipping):
    from flashdp_compile import Refusal

    with pytest.raises(Refusal, match=word) as caught:
        compiled(module, clipping)(data).abs().sum(1).mean().backward()
    assert all(p.grad is None for p in module.parameters())
    kind = "sparse" if "sparse" in word else "complex"
    coverage.mode(f"{kind} gradients, {clipping}", f"refused: {what(caught.value)}")
