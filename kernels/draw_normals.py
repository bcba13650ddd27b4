"""Standard normal numbers for several tensors in one launch.

    out_i = the numbers that add_noise adds to a tensor of sizes_i elements, for (key, streams_i)

A caller that adds them by ordinary code lets the compiler fuse the addition into what makes a gradient, so that small
gradients cost no launch of their own. Every result is a tensor of its own, and not a part of one: code that reads it
is then the same for all layers of a model, and is compiled once.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from flashdp_compile.kernels import gaussian
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import cdiv, start
from flashdp_compile.kernels.family import Family

BLOCK = 1024


def reference(key: Tensor, sizes: list[int], streams: list[int]) -> list[Tensor]:
    return [gaussian.gaussian(size, key, stream) for size, stream in zip(sizes, streams, strict=True)]


def fake(key: Tensor, sizes: list[int], streams: list[int]) -> list[Tensor]:
    return [key.new_empty(size, dtype=torch.float32) for size in sizes]


@dataclass(frozen=True)
class Part:
    first: int  # program
    size: int
    stream: int


@dataclass(frozen=True)
class Spec:
    parts: tuple[Part, ...]
    block: int = BLOCK


def specialise(key: Tensor, sizes: list[int], streams: list[int]) -> Spec:
    starts = accumulate((cdiv(size, BLOCK) for size in sizes), initial=0)
    return Spec(tuple(Part(*part) for part in zip(starts, sizes, streams, strict=False)))


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(key_ptr{% for _ in parts %}, out{{ loop.index0 }}_ptr{% endfor %}):
    number = tl.program_id(0).to(tl.int64)
    zero, out = number * 0, out0_ptr
    first, size, noise_stream = zero, zero + {{ parts[0].size }}, zero + {{ parts[0].stream }}
{% for part in parts[1:] %}
    if number >= {{ part.first }}:
        out = out{{ loop.index }}_ptr
        first, size, noise_stream = zero + {{ part.first }}, zero + {{ part.size }}, zero + {{ part.stream }}
{% endfor %}
    start = (number - first) * {{ block }}
    {{ draw_normals("start // 4 + tl.arange(0, %d)" % (block // 4), block) | indent(4) }}
    n = start + tl.arange(0, {{ block }})
    tl.store(out + n, normals, mask=n < size)
"""


def launch(key: Tensor, sizes: list[int], streams: list[int]) -> list[Tensor]:
    for stream in streams:
        gaussian.word(stream)
    out = fake(key, sizes, streams)
    programs = sum(cdiv(size, BLOCK) for size in sizes)
    if programs:
        start(kernel(FAMILY, specialise(key, sizes, streams)), programs, key, key, *out)
    return out


def example(case, dtype, device, generator):
    key = torch.tensor([-0x123456789ABCDEF0, 0x1F2345678], device=device)
    return key, list(case), [(7 + 1000003 * n) % 2**32 for n in range(len(case))]


FAMILY = Family(
    name="draw_normals",
    schema="(Tensor key, int[] sizes, int[] streams) -> Tensor[]",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((1, 1024, 1025), (3, 5000), (2048,), (7, 1, 3, 4, 1023), (1,), (5,)),  # sizes
    example=example,
)
