"""Counter-based Gaussian noise: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Elements 4 i .. 4 i + 3 of a tensor, in row-major order, come from one Philox block:

    counter words   c0 = i,  c1 = stream,  c2 = low word of step,  c3 = high word of step
    key words       low and high word of k          key = tensor [k, step] int64, read as unsigned
    output words    (w0, w1) and (w2, w3), each pair by Box-Muller, in float32:
                    u1 = w 2^-32 + 2^-33 in (0, 1],  u2 = w 2^-32 in [0, 1],  radius = sqrt(-2 ln u1) <= 6.77
                    (radius cos 2 pi u2, radius sin 2 pi u2)

Equal (k, step, stream) give equal noise on every device (the words bit for bit, the values to a few units in the last
place) and for every memory layout; different ones give independent noise. A tensor holds at most 2^34 elements.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, example_key, randn, start
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.philox import KEY_A, KEY_B, ROUND_A, ROUND_B, WORD

CHUNK = 1 << 15  # Philox blocks at a time and thread: the four words and their products stay in the cache


def round_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Key words of the ten rounds, each [10], from a key [] int64. Stays on the key's device: no synchronisation."""
    rounds = torch.arange(10, device=k.device)
    return ((k & WORD) + rounds * KEY_A) & WORD, ((k >> 32) + rounds * KEY_B) & WORD


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, keys: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds on 32-bit words held in int64, of one shape. Products wrap modulo 2^64: a masked shift is a high word.

    In place where it can be: half of the time goes into fresh memory otherwise.
    """
    for k0, k1 in zip(*keys, strict=True):
        first, second = c0 * ROUND_A, c2 * ROUND_B
        c0 = (second >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = (first >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = second.bitwise_and_(WORD), first.bitwise_and_(WORD)
    return c0, c1, c2, c3


def gaussian(shape: int | tuple[int, ...], key: Tensor, stream: int, block: int = 0) -> Tensor:
    """Standard normal float32 tensor of this shape on the key's device. key [2] int64, 0 <= stream < 2^32. It begins
    with that block, as a shard does."""
    word(stream)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    numel = math.prod(shape)
    blocks = cdiv(numel, 4)
    out = torch.empty((blocks, 4), dtype=torch.float32, device=key.device)
    keys = round_keys(key[0])
    stream_word, low, high = key.new_full((1,), stream), key[1:] & WORD, (key[1:] >> 32) & WORD
    step = CHUNK * torch.get_num_threads() if key.device.type == "cpu" else blocks
    for first in range(0, blocks, max(step, 1)):
        rows = out[first : first + step]
        indices = torch.arange(block + first, block + first + len(rows), device=key.device)
        c1, c2, c3 = (word.expand(len(rows)) for word in (stream_word, low, high))
        words = philox(indices, c1, c2, c3, keys)
        for half in (0, 2):
            radius = words[half].to(torch.float32).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
            angle = words[half + 1].to(torch.float32).mul_(2.0**-32).mul_(2 * math.pi)
            torch.mul(radius, angle.cos(), out=rows[:, half])
            torch.mul(radius, angle.sin_(), out=rows[:, half + 1])
    return out.view(-1)[:numel].view(shape)


def reference(grad: Tensor, key: Tensor, stream: int, std: float, block: int = 0) -> Tensor:
    noise = gaussian(grad.shape, key, stream, block).to(accumulator(grad))
    return noise.mul_(std).add_(grad).to(grad.dtype)


def fake(grad: Tensor, key: Tensor, stream: int, std: float) -> Tensor:
    return grad.new_empty(grad.shape)


@dataclass(frozen=True)
class Spec:
    block: int = 256


def specialise(grad: Tensor, key: Tensor, stream: int, std: float) -> Spec:
    return Spec()


TEMPLATE = """
import triton
import triton.language as tl


@triton.jit
def kernel(grad_ptr, key_ptr, noise_stream, std, out_ptr, N):
    first = tl.program_id(0).to(tl.int64) * {{ block }}
    {{ draw_normals("first + tl.arange(0, %d)" % block, "%d, 4" % block) | indent(4) }}
    n = 4 * i[:, None] + tl.arange(0, 4)[None, :]
    b_grad = tl.load(grad_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, (b_grad + tl.full([], std, tl.float32) * normals).to(out_ptr.dtype.element_ty), mask=n < N)
"""


def launch(grad: Tensor, key: Tensor, stream: int, std: float) -> Tensor:
    word(stream)
    spec = specialise(grad, key, stream, std)
    grad = grad.contiguous()  # elements are numbered in row-major order, whatever the layout
    out = torch.empty_like(grad)
    programs = cdiv(grad.numel(), 4 * spec.block)
    start(kernel(FAMILY, spec), programs, grad, grad, key, stream, float(std), out, grad.numel())
    return out


def word(stream: int) -> int:
    """`stream` if it is one: ValueError otherwise."""
    if not 0 <= stream <= WORD:
        raise ValueError(f"a noise stream is an unsigned word of 32 bits: stream={stream}")
    return stream


def example(case, dtype, device, generator):
    key = example_key(device)
    return randn(case, dtype, device, generator), key, 7, 0.5


FAMILY = Family(
    name="add_noise",
    schema="(Tensor grad, Tensor key, int stream, float std) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((1, 1), (3, 5), (1,), (1025,), (63, 65), (0, 3), (2, 3, 4)),  # the shape of grad
    example=example,
)
