"""The norm of a tied table whose product is stored: never below the truth, and the truth where nothing cancels."""

import pytest
import torch

import flashdp_compile.pipeline  # noqa: F401  registers the ops
from flashdp_compile.kernels import FAMILIES, SLACK
from flashdp_compile.kernels.guard import gamma
from flashdp_compile.passes.strategies import embedding
from flashdp_compile.passes.strategies.embedding import stored_tied_sqnorm, tied_sqnorm

B, S, D, V = 3, 48, 40, 24


def parts(dtype: torch.dtype, repeats: int = 1) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(V, generator=g) for _ in range(B)]).repeat(1, repeats)
    ge, x, gl = (torch.randn(B, n, m, generator=g).to(dtype) for n, m in ((V * repeats, D), (S, D), (S, V)))
    return ids, ge, x, gl


def truth(ids: torch.Tensor, ge: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """|e + l|^2 of what is summed later, in float64."""
    total = product.double().clone()
    for b in range(B):
        total[b].index_add_(0, ids[b], ge[b].double())
    return total.square().sum((1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeats", [1, 4])
def test_it_is_the_norm_of_both_uses_together(dtype, repeats):
    ids, ge, x, gl = parts(dtype, repeats)
    product, got = stored_tied_sqnorm(ids, ge, x, gl)
    assert product.dtype == dtype
    torch.testing.assert_close(got.double(), truth(ids, ge, product), rtol=1e-5, atol=0)


@pytest.mark.parametrize("left", [0.0, 2.0**-20, 2.0**-14, 2.0**-8])
@pytest.mark.parametrize("repeats", [1, 16, 256])
def test_uses_that_cancel(left, repeats, monkeypatch):
    """The lookups undo the head's gradient but for a part, by rows that are large and cancel among themselves."""
    ids, ge, x, gl = parts(torch.float32, repeats)
    product, _ = stored_tied_sqnorm(ids, ge, x, gl)
    rows = ge.view(B, repeats, V, D)
    if repeats > 1:
        rows -= rows.mean(1, keepdim=True)
    else:
        rows.zero_()
    at = ids.view(B, repeats, V)[:, 0, :, None].expand(-1, -1, D)
    rows[:, 0] -= (1 - left) * product.gather(1, at)
    product, got = stored_tied_sqnorm(ids, ge, x, gl)
    true = truth(ids, ge, product)
    assert (got.sqrt() * (1 + SLACK) >= true.sqrt()).all()
    assert got.isfinite().all()
    if not left and repeats > 1:
        monkeypatch.setattr(embedding, "guarded", lambda est, bound: est)
        _, naive = stored_tied_sqnorm(ids, ge, x, gl)
        assert not (naive.sqrt() * (1 + SLACK) >= true.sqrt()).all(), "this example no longer needs the guard"


@pytest.mark.parametrize("tokens, left", [(4096, 0.01), (16384, 0.01), (32768, 0.005)])
@pytest.mark.parametrize("path", ["store", "gram"])
def test_one_row_again_and_again(tokens, left, path):
    """Far more lookups than the table has rows and columns, all alike, which the head's gradient almost undoes."""
    for seed in range(3):
        row = torch.rand(4, generator=torch.Generator().manual_seed(seed)) + 0.1
        ids, ge = torch.zeros(1, tokens, dtype=torch.int64), row.expand(1, tokens, 4).clone()
        x, gl = torch.zeros(1, 4, 4), torch.eye(4)[None]
        x[0, 0] = -((1 - left) * ge.double().sum(1)[0]).float()
        product, got = (
            stored_tied_sqnorm(ids, ge, x, gl) if path == "store" else (gl.mT @ x, tied_sqnorm(ids, ge, x, gl))
        )
        true = product.double()
        true[0, 0] += ge.double().sum(1)[0]
        summed = torch.ops.flashdp.embedding_sum(ids, ge, torch.ones(1), 4) + product[0]
        assert got.sqrt() * (1 + SLACK) >= true.norm()
        assert got.sqrt() * (1 + SLACK) >= summed.norm()


def test_positions_without_an_id_have_no_part():
    ids, ge, x, gl = parts(torch.float32)
    ids[:, 3] = -1
    _, clean = stored_tied_sqnorm(ids, ge, x, gl)
    ge[:, 3] = float("nan")
    assert torch.equal(stored_tied_sqnorm(ids, ge, x, gl)[1], clean)


@pytest.mark.parametrize("path", ["store", "gram"])
def test_the_guard_counts_the_lookups(path, monkeypatch):
    """With far more of them than rows and columns, the bound on the error is that of chains of their number."""
    ids, ge, x, gl = parts(torch.float32, 256)
    bounds = []
    monkeypatch.setattr(embedding, "guarded", lambda est, bound: bounds.append(bound) or est)
    measured = stored_tied_sqnorm if path == "store" else embedding.tied_sqnorm
    measured(ids, ge, x, gl)
    ids_of_all = ids.clone()
    ids[:, V:] = -1  # nearly all of them masked: fewer rows, and shorter chains
    measured(ids, ge, x, gl)
    long, short = bounds
    rows = ge.norm(dim=2).sum(1)
    lookups = FAMILIES["embedding_sqnorm"].reference(ids_of_all, ge).sqrt()
    least = gamma(torch.float32, 256 * V) * (2 * lookups * rows if path == "store" else rows.square())
    assert (long >= least).all()
    assert (short < long / 16).all()
