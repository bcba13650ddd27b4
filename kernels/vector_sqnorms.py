"""Squared norms of several small per-sample gradients together, in one launch.

    out[b] = sum_i |v_ib|^2          v_i [B, n_i] -> [B]

For biases and the scales of norms, of which a model has hundreds; see vector_sums.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, randn, start, widen
from flashdp_compile.kernels.family import Family, supported


def reference(values: list[Tensor]) -> Tensor:
    return torch.stack([v.square().sum(1) for v in widen(*values)]).sum(0)


def fake(values: list[Tensor]) -> Tensor:
    return values[0].new_empty(values[0].shape[0], dtype=accumulator(*values))


@dataclass(frozen=True)
class Spec:
    sizes: tuple[int, ...]
    block: int = 1024


def specialise(values: list[Tensor]) -> Spec:
    return Spec(tuple(v.shape[1] for v in values))


# One program for each vector of each sample.
TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(part_ptr, B{% for _ in sizes %}, v{{ loop.index0 }}_ptr{% endfor %}):
    number = tl.program_id(0).to(tl.int64)
    vector, b = number // B, number % B
    v, size = v0_ptr, number * 0 + {{ sizes[0] }}
{% for size in sizes[1:] %}
    if vector >= {{ loop.index }}:
        v, size = v{{ loop.index }}_ptr, number * 0 + {{ size }}
{% endfor %}
    total = tl.zeros([{{ block }}], tl.float32)
    for first in range(0, size, {{ block }}):
        n = first + tl.arange(0, {{ block }})
        values = tl.load(v + b * size + n, mask=n < size, other=0.0).to(tl.float32)
        total += values * values
    tl.store(part_ptr + number, tl.sum(total))
"""


def launch(values: list[Tensor]) -> Tensor:
    values = [v.contiguous() for v in values]
    B = values[0].shape[0]
    # every slot is written by one program, so empty is safe
    part = values[0].new_empty((len(values), B), dtype=torch.float32)
    start(kernel(FAMILY, specialise(values)), part.numel(), part, part, B, *values)
    return part.sum(0)


def supports(values: list[Tensor]) -> bool:
    return supported(*values) and len({v.dtype for v in values}) == 1


def example(case, dtype, device, generator):
    B, *sizes = case
    return ([randn((B, n), dtype, device, generator) for n in sizes],)


FAMILY = Family(
    name="vector_sqnorms",
    schema="(Tensor[] values) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 1, 128, 1025), (40, 3, 500), (1, 2049), (5, 7, 1, 3, 4, 127), (2, 1), (0, 5)),  # B, n_0, n_1, ...
    example=example,
    supports=supports,
)
