"""Standard normal numbers for several tensors in one launch.

    out = the numbers that add_noise adds to tensors of these sizes, for (key, stream), one tensor after another

Each tensor starts at a multiple of BLOCK elements; what lies between is drawn and means nothing. A caller that adds a
part of `out` by ordinary code lets the compiler fuse the addition, so that small tensors cost no launch of their own.
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


def reference(key: Tensor, sizes: list[int], streams: list[int]) -> Tensor:
    out = [
        gaussian.gaussian(cdiv(size, BLOCK) * BLOCK, key, stream) for size, stream in zip(sizes, streams, strict=True)
    ]
    return torch.cat(out) if out else torch.empty(0, device=key.device)


def fake(key: Tensor, sizes: list[int], streams: list[int]) -> Tensor:
    return key.new_empty(sum(cdiv(size, BLOCK) for size in sizes) * BLOCK, dtype=torch.float32)


@dataclass(frozen=True)
class Spec:
    streams: tuple[tuple[int, int], ...]  # (first program, stream) of each tensor but the first, which begins at 0
    first: int  # the stream of that one
    block: int = BLOCK


def specialise(key: Tensor, sizes: list[int], streams: list[int]) -> Spec:
    starts = accumulate(cdiv(size, BLOCK) for size in sizes)
    return Spec(tuple(zip(starts, streams[1:], strict=False)), streams[0])


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(key_ptr, out_ptr):
    number = tl.program_id(0).to(tl.int64)
    noise_stream = number * 0 + {{ first }}
    first = number * 0
{% for begin, name in streams %}
    noise_stream = tl.where(number >= {{ begin }}, {{ name }}, noise_stream)
    first = tl.where(number >= {{ begin }}, {{ begin }}, first)
{% endfor %}
    {{ draw_normals("(number - first) * %d + tl.arange(0, %d)" % (block // 4, block // 4), block) | indent(4) }}
    tl.store(out_ptr + number * {{ block }} + tl.arange(0, {{ block }}), normals)
"""


def launch(key: Tensor, sizes: list[int], streams: list[int]) -> Tensor:
    for stream in streams:
        gaussian.word(stream)
    out = fake(key, sizes, streams)
    if len(out):
        start(kernel(FAMILY, specialise(key, sizes, streams)), len(out) // BLOCK, key, key, out)
    return out


def example(case, dtype, device, generator):
    key = torch.tensor([-0x123456789ABCDEF0, 0x1F2345678], device=device)
    return key, list(case), [(7 + 1000003 * n) % 2**32 for n in range(len(case))]


FAMILY = Family(
    name="draw_normals",
    schema="(Tensor key, int[] sizes, int[] streams) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((1, 1024, 1025), (3, 5000), (2048,), (7, 1, 3, 4, 1023), (1,), (5,)),  # sizes
    example=example,
)
