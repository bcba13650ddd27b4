"""Norm, weights and weighted sum of one layer, a few samples at a time.

    product[b] = round(x_b^T g_b), sqnorm[b] = |product[b]|_F^2 + beside[b]
    out = sum_b w(sqnorm[b]) product[b] (+ noise)

x [B, T, d], g [B, T, p], beside [B] -> [d, p] and sqnorm [B], both float32. `beside` are the squared norms of what else
is clipped with the layer, None if nothing is. What `outer_store`, `clip_factors` and `product_sum` do, but only
`samples` products are there at a time: those of all samples for the head of a language model are as large as the
gradient of its logits. Weights are those of clip.py, for a loss over all B samples: bound, fn, mean,
expected_batch_size and grad_scale are told as they are to `clip_factors`.

An op that stays one: its parts take turns in memory that Inductor would give to each of them.
"""

from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import outer_store, product_sums
from flashdp_compile.kernels.clip import release_weights_into
from flashdp_compile.kernels.common import accumulator, example_key, randn
from flashdp_compile.kernels.family import Family, supported


def reference(x: Tensor, g: Tensor, samples: int, beside: Tensor | None, *told: Any) -> tuple[Tensor, Tensor]:
    *policy, key, stream, std = told
    product, sqnorm = outer_store.reference(x, g)
    sqnorm = sqnorm if beside is None else sqnorm + beside
    weights = release_weights_into(None, sqnorm, None, *policy)
    return product_sums.reference([product], [weights], key, [stream], std)[0], sqnorm


def fake(x: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x, g)
    return x.new_empty((x.shape[2], g.shape[2]), dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def specialise(x: Tensor, g: Tensor, samples: int, *rest: Any) -> product_sums.Spec:
    """That of the sums behind the first part."""
    *_, key, _, _ = rest
    product = x.new_empty((min(samples, x.shape[0]), x.shape[2], g.shape[2]))
    return product_sums.specialise([product], [product[:, 0, 0]], key, onto=True)


def launch(x: Tensor, g: Tensor, samples: int, beside: Tensor | None, *told: Any) -> tuple[Tensor, Tensor]:
    *policy, key, stream, std = told
    batch, total, norms = x.shape[0], list[Tensor](), list[Tensor]()
    for first in range(0, max(batch, 1), samples):
        product, sqnorm = outer_store.launch(x[first : first + samples], g[first : first + samples])
        sqnorm = sqnorm if beside is None else sqnorm + beside[first : first + samples]
        weights = release_weights_into(None, sqnorm, None, *policy, batch=batch)
        last = first + samples >= batch  # behind which the noise comes
        total = product_sums.launch([product], [weights], key if last else None, [stream], std, onto=total or None)
        norms.append(sqnorm)
        del product  # before the next ones are made
    return total[0], torch.cat(norms)


def supports(x: Tensor, g: Tensor, samples: int, beside: Tensor | None, *rest: Any) -> bool:
    return supported(x, g) and (beside is None or beside.dtype == torch.float32)


def example(case: Any, dtype: torch.dtype, device: Any, generator: torch.Generator) -> tuple[Any, ...]:
    B, T, d, p, samples, others = case
    x, g = randn((B, T, d), dtype, device, generator), randn((B, T, p), dtype, device, generator)
    scale = torch.full((), 4.0, device=device)
    beside = randn((B,), torch.float32, device, generator).square() if others else None
    return x, g, samples, beside, 0.5, "hard", True, 7, scale, example_key(device), 5, 0.1


FAMILY = Family(
    name="clipped_product",
    schema="(Tensor x, Tensor g, int samples, Tensor? beside, float bound, str fn, bool mean, "
    "int? expected_batch_size, Tensor? grad_scale, Tensor? key, int stream, float std) -> (Tensor, Tensor)",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=product_sums.TEMPLATE,
    # B, T, d, p, samples at a time, whether others are clipped with it
    cases=((5, 6, 7, 9, 2, 1), (4, 65, 33, 63, 1, 0), (3, 4, 16, 8, 3, 1), (1, 1, 1, 1, 1, 0), (0, 3, 2, 4, 2, 1)),
    example=example,
    supports=supports,
    stays_op=lambda *args: True,
)
