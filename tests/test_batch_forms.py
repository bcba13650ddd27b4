"""How a batch may come, and what attention and dropout may be asked for."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from reference import gradients_one_by_one, relative_errors, release

B, T, WIDTH, BOUND = 4, 5, 8, 0.3
OPTIONS = {"compiler": "eager", "noise_multiplier": 0.0, "max_grad_norm": BOUND}


@dataclasses.dataclass
class Record:
    x: Tensor
    scale: Tensor


class Pair(NamedTuple):
    x: Tensor
    scale: Tensor


class Reads(nn.Module):
    """One linear layer, and a function that finds x and scale in whatever the batch is."""

    def __init__(self, find) -> None:
        super().__init__()
        self.linear, self.find = nn.Linear(WIDTH, 3), find

    def forward(self, batch):
        x, scale = self.find(batch)
        return (self.linear(x) * scale[:, None]).square().sum(1)


def loop(model, samples, clipping="flat"):
    """The release of losses `model(*sample)`, one sample at a time."""
    own = gradients_one_by_one(model, (model(*sample).sum() for sample in samples))
    return release(own, clipping=clipping, max_grad_norm=BOUND).gradients


def errors(model, expected):
    return max(relative_errors({n: p.grad for n, p in model.named_parameters()}, expected).values())


FORMS = {
    "dict": (lambda x, s: {"x": x, "scale": s}, lambda b: (b["x"], b["scale"])),
    "nested": (lambda x, s: {"inputs": [x], "more": (s,)}, lambda b: (b["inputs"][0], b["more"][0])),
    "dataclass": (Record, lambda b: (b.x, b.scale)),
    "named tuple": (Pair, lambda b: (b.x, b.scale)),
}


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_any_form(form, clipping):
    pack, find = FORMS[form]
    model, x, scale = Reads(find), torch.randn(B, WIDTH), torch.rand(B) + 0.5
    expected = loop(model, [(pack(x[b : b + 1], scale[b : b + 1]),) for b in range(B)], clipping)
    options = {**OPTIONS, "clipping": clipping}
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    compiled(pack(x, scale)).mean().backward()
    assert errors(model, expected) < 1e-5


class Attends(nn.Module):
    """Attention of one kernel, with a mask of each sample or none."""

    def __init__(self, backend) -> None:
        super().__init__()
        self.qkv, self.backend = nn.Linear(WIDTH, 3 * WIDTH), backend

    def forward(self, x, mask=None):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        with sdpa_kernel(self.backend):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return mixed.square().flatten(1).sum(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_each_kernel_of_attention(backend, masked):
    model, x = Attends(backend), torch.randn(B, T, WIDTH)
    mask = torch.randn(B, 1, T, T)
    samples = [(x[b : b + 1], *([mask[b : b + 1]] if masked else [])) for b in range(B)]
    expected = loop(model, samples)
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=OPTIONS)
    compiled(x, *([mask] if masked else [])).mean().backward()
    assert errors(model, expected) < 1e-5


class MasksOfHeads(nn.Module):
    """nn.MultiheadAttention with attn_mask [B * heads, T, T]: each sample has masks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x, mask):
        mixed, _ = self.attention(x, x, x, attn_mask=mask.flatten(0, 1), need_weights=False)
        return mixed.square().flatten(1).sum(1)


def test_masks_of_heads():
    model, x, mask = MasksOfHeads(), torch.randn(B, T, WIDTH), torch.randn(B, 2, T, T)
    expected = loop(model, [(x[b : b + 1], mask[b : b + 1]) for b in range(B)])
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=OPTIONS)
    compiled(x, mask).mean().backward()
    assert errors(model, expected) < 1e-5


class Drops(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.linear, self.drop, self.recompute = nn.Linear(1, 400, bias=False), nn.Dropout(0.5), recompute

    def body(self, x):
        return self.drop(self.linear(x))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_that_of_the_forward_and_new_in_each_step(recompute, compiler):
    """Output and gradient show the mask: what was dropped is zero in both, for every sample by itself."""
    model = Drops(recompute)
    model.linear.weight.data.fill_(1.0)
    options = {**OPTIONS, "compiler": compiler, "max_grad_norm": 1e6, "loss_reduction": "sum"}
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    seen = []
    for _ in range(3):
        model.zero_grad()
        outputs = compiled(torch.tensor([[1.0], [10.0]]))
        kept = outputs.detach() != 0
        assert 0.35 < kept.float().mean() < 0.65 and not torch.equal(kept[0], kept[1])
        outputs.sum().backward()
        expected = 2 * kept[0].float() + 20 * kept[1].float()
        torch.testing.assert_close(model.linear.weight.grad[:, 0], expected, rtol=1e-5, atol=1e-5)
        seen.append(kept)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
