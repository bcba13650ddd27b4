"""Every loss of torch.nn.functional, with each reduction, inside and outside of the compiled region.

A mean whose divisor is a constant or the number of samples is sound, and its gradients are those of a loop over
samples. One that divides by a count or a weight over the whole batch is refused where flashdp can see it.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdp_compile.errors import Refusal
from reference import gradients_one_by_one, relative_errors, release

B, WIDTH, OUT = 4, 6, 9
BOUND = 0.4
REDUCTIONS = ("none", "mean", "sum")


class Loss(NamedTuple):
    """`of(outputs [B, OUT], targets, reduction)`; `counts`: its mean divides by a count over the batch."""

    targets: Callable[[], Tensor]
    of: Callable[[Tensor, Tensor, str], Tensor]
    counts: bool = False
    inside: bool = True


def values(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(B, *shape)


def shares(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(B, *shape)


def signs(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 2, (B, *shape)).float() * 2 - 1


def ids(highest: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, highest, (B, *shape))


def several_labels() -> Tensor:
    return torch.tensor([[3, 0, -1, 1, 2]]).repeat(B, 1)


def paths(o: Tensor, t: Tensor, r: str) -> Tensor:
    steps = o[:, :8].unflatten(1, (2, 4)).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(steps, t + 1, torch.full((len(o),), 2), torch.full((len(o),), 1), reduction=r)


# dynamo or torch's decomposition stands in the way inside: gaussian_nll_loss (a check of data), ctc_loss, and
# multilabel_margin_loss, whose decomposition gives other values than the op, with any backend
LOSSES = {
    "l1": Loss(values(OUT), lambda o, t, r: F.l1_loss(o, t, reduction=r)),
    "mse": Loss(values(OUT), lambda o, t, r: F.mse_loss(o, t, reduction=r)),
    "huber": Loss(values(OUT), lambda o, t, r: F.huber_loss(o, t, reduction=r)),
    "smooth l1": Loss(values(OUT), lambda o, t, r: F.smooth_l1_loss(o, t, reduction=r, beta=0.5)),
    "binary cross entropy": Loss(shares(OUT), lambda o, t, r: F.binary_cross_entropy(o.sigmoid(), t, reduction=r)),
    "its logits": Loss(shares(OUT), lambda o, t, r: F.binary_cross_entropy_with_logits(o, t, reduction=r)),
    "weighted logits": Loss(
        shares(5),
        lambda o, t, r: F.binary_cross_entropy_with_logits(o[:, :5], t, pos_weight=torch.arange(1.0, 6.0), reduction=r),
    ),
    "divergence": Loss(shares(OUT), lambda o, t, r: F.kl_div(o.log_softmax(-1), t.softmax(-1), reduction=r)),
    "divergence of logarithms": Loss(
        values(OUT), lambda o, t, r: F.kl_div(o.log_softmax(-1), t.log_softmax(-1), reduction=r, log_target=True)
    ),
    "cross entropy": Loss(ids(OUT), lambda o, t, r: F.cross_entropy(o, t, reduction=r), counts=True),
    "smoothed": Loss(ids(OUT), lambda o, t, r: F.cross_entropy(o, t, reduction=r, label_smoothing=0.1), counts=True),
    "of probabilities": Loss(shares(OUT), lambda o, t, r: F.cross_entropy(o, t.softmax(-1), reduction=r)),
    "negative log likelihood": Loss(
        ids(OUT), lambda o, t, r: F.nll_loss(o.log_softmax(-1), t, reduction=r), counts=True
    ),
    "poisson": Loss(shares(OUT), lambda o, t, r: F.poisson_nll_loss(o, t, reduction=r)),
    "poisson with Stirling": Loss(
        lambda: 4 * torch.rand(B, OUT), lambda o, t, r: F.poisson_nll_loss(o, t, reduction=r, full=True)
    ),
    "gaussian": Loss(
        values(4), lambda o, t, r: F.gaussian_nll_loss(o[:, :4], t, o[:, 4:8].exp(), reduction=r), inside=False
    ),
    "soft margin": Loss(signs(OUT), lambda o, t, r: F.soft_margin_loss(o, t, reduction=r)),
    "hinge embedding": Loss(signs(OUT), lambda o, t, r: F.hinge_embedding_loss(o, t, reduction=r)),
    "margins of several labels": Loss(
        several_labels, lambda o, t, r: F.multilabel_margin_loss(o[:, :5], t, reduction=r), inside=False
    ),
    "soft margins of several labels": Loss(
        lambda: torch.randint(0, 2, (B, OUT)).float(), lambda o, t, r: F.multilabel_soft_margin_loss(o, t, reduction=r)
    ),
    "margins of one label": Loss(ids(OUT), lambda o, t, r: F.multi_margin_loss(o, t, reduction=r)),
    "cosine embedding": Loss(
        signs(), lambda o, t, r: F.cosine_embedding_loss(o[:, :4], o[:, 4:8], t, margin=0.1, reduction=r)
    ),
    "margin of ranks": Loss(
        signs(), lambda o, t, r: F.margin_ranking_loss(o[:, 0], o[:, 1], t, margin=0.1, reduction=r)
    ),
    "triplet": Loss(
        values(1), lambda o, t, r: F.triplet_margin_loss(o[:, :3], o[:, 3:6], o[:, 6:], margin=9.0, reduction=r)
    ),
    "triplet with a distance": Loss(
        values(1),
        lambda o, t, r: F.triplet_margin_with_distance_loss(o[:, :3], o[:, 3:6], o[:, 6:], margin=9.0, reduction=r),
    ),
    "paths": Loss(ids(3, 1), paths, inside=False),
}


class Inside(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss, reduction: str) -> None:
        super().__init__()
        self.model, self.loss, self.reduction = model, loss, reduction

    def forward(self, x, targets):
        return self.loss.of(self.model(x), targets, self.reduction)


def scalar(losses: Tensor) -> Tensor:
    return losses if losses.dim() == 0 else losses.flatten(1).mean(1).mean() if losses.dim() > 1 else losses.mean()


def expected(model: nn.Module, loss: Loss, reduction: str, x: Tensor, targets: Tensor, clipping: str):
    losses = (scalar(loss.of(model(x[b : b + 1]), targets[b : b + 1], reduction)) for b in range(B))
    own = gradients_one_by_one(model, losses)
    how = "sum" if reduction == "sum" else "mean"
    return release(own, clipping=clipping, max_grad_norm=BOUND, loss_reduction=how)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_exact_or_refused(name, reduction):
    loss = LOSSES[name]
    clipping = ("flat", "per_layer")[(list(LOSSES).index(name) + REDUCTIONS.index(reduction)) % 2]
    model, x, targets = nn.Linear(WIDTH, OUT), torch.randn(B, WIDTH), loss.targets()
    wanted = expected(model, loss, reduction, x, targets, clipping)
    assert (wanted.norms > 0).any()
    how = "sum" if reduction == "sum" else "mean"
    options = {"clipping": clipping, "max_grad_norm": BOUND, "loss_reduction": how}
    options |= {"noise_multiplier": 0.0, "compiler": "eager"}
    for inside in (False, True) if loss.inside else (False,):
        trained = copy.deepcopy(model)
        region = Inside(trained, loss, reduction) if inside else trained
        compiled = torch.compile(region, backend="flashdp", fullgraph=True, options=options)
        if inside and reduction == "mean" and loss.counts:
            with pytest.raises(Refusal, match="reduction='none'"):
                compiled(x, targets)
            continue
        scalar(compiled(x, targets) if inside else loss.of(compiled(x), targets, reduction)).backward()
        found = {n: p.grad for n, p in trained.named_parameters()}
        assert max(relative_errors(found, wanted.gradients).values()) < 1e-5, "inside" if inside else "outside"


def test_all_losses_of_torch_are_here():
    known = {n for n in dir(F) if n.endswith(("_loss", "cross_entropy", "kl_div", "_logits")) and not n.startswith("_")}
    used = {
        n for loss in LOSSES.values() for n in (*loss.of.__code__.co_names, *loss.of.__code__.co_consts) if n in known
    }
    assert known - used <= {"linear_cross_entropy"}, "a new loss of torch needs a row"
