"""Clip weights of several groups of parameters, each from the parts of its norm, in one launch.

    sqnorms[k, b] = sum_i |v_ib|^2 + sum_j n_jb           over the vectors v_i [B, n_i] and the norms n_j [B] of group k
    weights[k, b] = release_weights(sqnorms[k], bound_k)[b]                                               see clip.py

`values` are the vectors, those of group 0 first: biases and the scales of norms. `norms` are the squared norms of what
else the groups hold, in the same order. `vectors` and `others` say how many of each a group has -> weights and sqnorms
[K, B] float32. A sample whose sqnorm is negative or not finite has a weight of 0; its sqnorm is left as it is.

A model of which every layer is clipped by itself has dozens of groups, and in each the numbers of one batch to add, to
compare and to divide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.kernels import clip
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, randn, start, widen
from flashdp_compile.kernels.family import Family, supported


def reference(
    values: list[Tensor],
    norms: list[Tensor],
    vectors: list[int],
    others: list[int],
    bounds: list[float],
    fn: str,
    mean: bool,
    expected_batch_size: int | None,
) -> tuple[Tensor, Tensor]:
    wide = widen(*values, *norms)
    squares, rest = [v.square().sum(1) for v in wide[: len(values)]], wide[len(values) :]
    parts = zip(_of_groups(squares, vectors), _of_groups(rest, others), strict=True)
    sqnorms = torch.stack([torch.stack([*a, *b]).sum(0) for a, b in parts])
    rule = fn, mean, expected_batch_size
    weights = [clip.release_weights(s, bound, *rule) for s, bound in zip(sqnorms, bounds, strict=True)]
    return torch.stack(weights).to(sqnorms.dtype), sqnorms


def _of_groups(parts: Sequence[Any], counts: list[int]) -> Iterator[Sequence[Any]]:
    """The parts of each group."""
    for count, end in zip(counts, accumulate(counts), strict=True):
        yield parts[end - count : end]


def fake(values: list[Tensor], norms: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    like, (_, _, bounds, *_) = (*values, *norms)[0], rest
    shape, dtype = (len(bounds), like.shape[0]), accumulator(*values, *norms)
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Spec:
    sizes: tuple[int, ...]  # of the vectors
    norms: int
    vectors: tuple[int, ...]  # of each group
    others: tuple[int, ...]
    fn: str
    block: int = 1024


def specialise(
    values: list[Tensor], norms: list[Tensor], vectors: list[int], others: list[int], bounds: list[float], *rule: Any
) -> Spec:
    return Spec(tuple(v.shape[1] for v in values), len(norms), tuple(vectors), tuple(others), rule[0])


# One program for each sample of each group. Every vector is squared and summed by itself, in chains of its own length.
# Triton makes a constant of a B that is 1, sees addresses that are aligned then, and adds up in another order.
TEMPLATE = (
    clip.MACROS
    + """
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B"])
def kernel(weight_ptr, sqnorm_ptr, gamma_arg, scale_arg, divisor_arg, least_arg, B
{%- for _ in vectors %}, limit{{ loop.index0 }}{% endfor %}
{%- for _ in sizes %}, v{{ loop.index0 }}_ptr{% endfor %}
{%- for n in range(norms) %}, n{{ n }}_ptr{% endfor %}):
    number = tl.program_id(0).to(tl.int64)
    group, b = number // B, number % B
    zero = number * 0
    limit = tl.full([], limit0, tl.float32)
    vector, last_vector, norm, last_norm = zero, zero + {{ vectors[0] }}, zero, zero + {{ others[0] }}
{% for k in range(1, vectors | length) %}
    if group >= {{ k }}:
        limit = tl.full([], limit{{ k }}, tl.float32)
        vector, last_vector = zero + {{ vectors[:k] | sum }}, zero + {{ vectors[:k + 1] | sum }}
        norm, last_norm = zero + {{ others[:k] | sum }}, zero + {{ others[:k + 1] | sum }}
{% endfor %}
    sqnorm = tl.zeros([], tl.float32)
{% if sizes %}
    for i in range(vector, last_vector):
        v, size = v0_ptr, zero + {{ sizes[0] }}
{% for size in sizes[1:] %}
        if i >= {{ loop.index }}:
            v, size = v{{ loop.index }}_ptr, zero + {{ size }}
{% endfor %}
        squares = tl.zeros([{{ block }}], tl.float32)
        for first in range(0, size, {{ block }}):
            n = first + tl.arange(0, {{ block }})
            values = tl.load(v + b * size + n, mask=n < size, other=0.0).to(tl.float32)
            squares += values * values
        sqnorm += tl.sum(squares)
{% endif %}
{% if norms %}
    for i in range(norm, last_norm):
        n_ptr = n0_ptr
{% for j in range(1, norms) %}
        if i >= {{ j }}:
            n_ptr = n{{ j }}_ptr
{% endfor %}
        sqnorm += tl.load(n_ptr + b).to(tl.float32)
{% endif %}
    tl.store(sqnorm_ptr + number, sqnorm)
    # Inductor hands numbers over in 64 bits
    scale, divisor = tl.full([], scale_arg, tl.float32), tl.full([], divisor_arg, tl.float32)
    gamma, least = tl.full([], gamma_arg, tl.float32), tl.full([], least_arg, tl.float32)
    length = tl.sqrt_rn(tl.where(sqnorm < least, least, sqnorm)) * scale
    finite = (sqnorm >= 0.0) & (length < float("inf"))  # neither negative nor NaN
    weight = tl.div_rn({{ factor("length", "limit", "gamma", fn) }} * scale, divisor)
    tl.store(weight_ptr + number, tl.where(finite, weight, 0.0))
"""
)


def launch(
    values: list[Tensor],
    norms: list[Tensor],
    vectors: list[int],
    others: list[int],
    bounds: list[float],
    fn: str,
    mean: bool,
    expected_batch_size: int | None,
) -> tuple[Tensor, Tensor]:
    for bound in bounds:
        clip.check(bound, fn)
    values, norms = [v.contiguous() for v in values], [n.contiguous() for n in norms]
    spec = specialise(values, norms, vectors, others, bounds, fn)
    like = (*values, *norms)[0]
    (B, *_) = like.shape
    # every slot is written by one program, so empty is safe
    weights, sqnorms = (like.new_empty((len(bounds), B), dtype=torch.float32) for _ in range(2))
    limits = [bound * clip.LOWERED for bound in bounds]
    numbers = clip.GAMMA, *clip.scales(B, mean, expected_batch_size), clip.LEAST, B
    start(kernel(FAMILY, spec), weights.numel(), like, weights, sqnorms, *numbers, *limits, *values, *norms)
    return weights, sqnorms


def supports(values: list[Tensor], norms: list[Tensor], *rest: Any) -> bool:
    return supported(*values, *norms) and all(len({t.dtype for t in own}) <= 1 for own in (values, norms))


def example(case, dtype, device, generator):
    B, groups, *sizes = case  # the groups have as many vectors each, or one less; every other one has a norm besides
    vectors = [len(sizes[k::groups]) for k in range(groups)]
    others = [k % 2 if count else 1 for k, count in enumerate(vectors)]
    values = [randn((B, n), dtype, device, generator) for n in sizes]
    norms = [randn((B,), dtype, device, generator).square() for _ in range(sum(others))]
    bounds = [3.0 / (1 + k) for k in range(groups)]
    return values, norms, vectors, others, bounds, clip.FUNCTIONS[B % 3], B % 2 == 0, (None, B + 1)[B % 2]


FAMILY = Family(
    name="group_weights",
    schema="(Tensor[] values, Tensor[] norms, int[] vectors, int[] others, float[] bounds, str fn, bool mean, "
    "int? expected_batch_size) -> (Tensor, Tensor)",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 1, 7), (40, 3, 128, 1025, 5, 1, 500), (2, 2, 3), (1, 1), (4, 2, 2049, 2), (0, 1, 5)),  # B, K, n_0, ...
    example=example,
    supports=supports,
)
