"""Weighted sums of several small per-sample gradients, with noise, in one launch.

    out_i = sum_b w_ib v_ib + std * (the numbers that add_noise draws for (key, streams_i))

v_i [B, n_i], w_i [B] float32 -> [n_i]. For biases and the scales of norms, of which a model has hundreds: each
is worth a few microseconds of a device, and as much again to launch. A sample of weight 0 is not read.

Every result is a tensor of its own, and not a part of one: code that reads it is then the same for all layers of a
model, and is compiled once.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian, product_sum
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, example_key, randn, start
from flashdp_compile.kernels.family import Family, supported

BLOCK = 128


def reference(values: list[Tensor], weights: list[Tensor], key: Tensor, streams: list[int], std: float) -> list[Tensor]:
    return [
        product_sum.reference(v[:, None], w, key, stream, std)[0]
        for v, w, stream in zip(values, weights, streams, strict=True)
    ]


def fake(values: list[Tensor], weights: list[Tensor], key: Tensor, streams: list[int], std: float) -> list[Tensor]:
    return [v.new_empty(v.shape[1], dtype=accumulator(v)) for v in values]


@dataclass(frozen=True)
class Part:
    first: int  # program
    size: int
    stream: int


@dataclass(frozen=True)
class Spec:
    parts: tuple[Part, ...]
    block: int = BLOCK
    at_once: int = 32  # samples


def specialise(values: list[Tensor], weights: list[Tensor], key: Tensor, streams: list[int], std: float) -> Spec:
    sizes = [v.shape[1] for v in values]
    starts = accumulate((cdiv(size, BLOCK) for size in sizes), initial=0)
    return Spec(tuple(Part(*part) for part in zip(starts, sizes, streams, strict=False)))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(key_ptr, std, B{% for _ in parts %}, v{{ loop.index0 }}_ptr, w{{ loop.index0 }}_ptr, out{{ loop.index0 }}_ptr
{%- endfor %}):
    number = tl.program_id(0).to(tl.int64)
    zero, v, w, out = number * 0, v0_ptr, w0_ptr, out0_ptr
    first, size, noise_stream = zero, zero + {{ parts[0].size }}, zero + {{ parts[0].stream }}
{% for part in parts[1:] %}
    if number >= {{ part.first }}:
        v, w, out = v{{ loop.index }}_ptr, w{{ loop.index }}_ptr, out{{ loop.index }}_ptr
        first, size, noise_stream = zero + {{ part.first }}, zero + {{ part.size }}, zero + {{ part.stream }}
{% endfor %}
    start = (number - first) * {{ block }}
    n = start + tl.arange(0, {{ block }})
    total = tl.zeros([{{ block }}], tl.float32)
    for b in range(0, B, {{ at_once }}):
        sample = b + tl.arange(0, {{ at_once }}).to(tl.int64)
        weight = tl.load(w + sample, mask=sample < B, other=0.0)
        read = (weight != 0.0)[:, None] & (n < size)[None, :]
        values = tl.load(v + sample[:, None] * size + n[None, :], mask=read, other=0.0)
        total += tl.sum(weight[:, None] * values.to(tl.float32), 0)
    {{ draw_normals("start // 4 + tl.arange(0, %d)" % (block // 4), block) | indent(4) }}
    tl.store(out + n, total + tl.full([], std, tl.float32) * normals, mask=n < size)
"""


def launch(values: list[Tensor], weights: list[Tensor], key: Tensor, streams: list[int], std: float) -> list[Tensor]:
    for stream in streams:
        gaussian.word(stream)
    values, weights = [v.contiguous() for v in values], [w.contiguous() for w in weights]
    out = fake(values, weights, key, streams, std)
    if values:
        spec = specialise(values, weights, key, streams, std)
        programs = spec.parts[-1].first + cdiv(spec.parts[-1].size, BLOCK)
        pointers = (t for part in zip(values, weights, out, strict=True) for t in part)
        start(kernel(FAMILY, spec), programs, key, key, std, values[0].shape[0], *pointers)
    return out


def supports(values: list[Tensor], weights: list[Tensor], key: Tensor, streams: list[int], std: float) -> bool:
    return supported(*values, *weights) and len({v.dtype for v in values}) == 1


def example(case, dtype, device, generator):
    B, *sizes = case
    numbers = range(len(sizes))
    key = example_key(device)
    weights = torch.rand(B, generator=generator).to(device)
    weights[1::3] = 0
    values = [randn((B, n), dtype, device, generator) for n in sizes]
    return values, [weights * (1 + n) for n in numbers], key, [(7 + 1000003 * n) % 2**32 for n in numbers], 0.7


FAMILY = Family(
    name="vector_sums",
    schema="(Tensor[] values, Tensor[] weights, Tensor key, int[] streams, float std) -> Tensor[]",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((3, 1, 128, 129), (40, 3, 500), (1, 256), (5, 7, 1, 3, 4, 127), (2, 1), (0, 5)),  # B, n_0, n_1, ...
    example=example,
    supports=supports,
)
