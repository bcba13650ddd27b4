"""Secure noise: normals from ChaCha20, and a sum that is rounded to a grid. docs/secure-noise.md has the argument.

Elements 8 i .. 8 i + 7 of a tensor, in row-major order, come from block i of ChaCha20 (chacha.py), whose words are
w0 .. w15. Elements 8 i + 2 p and 8 i + 2 p + 1 come from the words (a, b, c, d) = w4p .. w4p+3, by Box-Muller:

                 a > 0, nearly always            a = 0, where c is needed for the radius
    u            2^-62 (k + 1/2)                 2^-94 (k + 1/2)
    k            the upper 62 bits of (a, b)     the upper 62 bits of (b, c)
    t            2 pi 2^-64 (d, c)               2 pi 2^-32 d
    values       radius cos t,  radius sin t     radius = sqrt(-2 ln u) <= 11.48

So u is uniform on (0, 1) in steps of 2^-62, and of 2^-94 below 2^-32; the radius of an exact normal exceeds the largest
with probability 2^-95. The kernel leaves c out of the angle: that moves a value by 2 pi 2^-32 radius <= 1.7e-8, about
what rounding to float32 does at 1/4, and the grid is 10^5 times as wide.

    out = round((grad + std * value) / grid(std)) * grid(std)       to nearest, ties to even, never -0; std 0: grad

in float32, or in float64 if grad is, and then in grad's dtype. Equal (key, stream) give equal words on every device,
and values equal to a few units in the last place: a sum that lies nearly halfway may be rounded to either side.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels import chacha
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import accumulator, cdiv, start
from flashdp_compile.kernels.family import Family
from flashdp_compile.kernels.gaussian import fake, word

FRACTION = 2.0**-8  # of std: it adds at most 2^-16 / 12 = 1.3e-6 of the variance
LIMITS = 2.0**-90, 2.0**90  # of std: the grid, and one over it, are normal float32
CHUNK = 1 << 12  # blocks at a time and thread: the state stays in the cache


def grid(std: float) -> float:
    """What released values are multiples of: the largest power of two not above std * 2^-8. 0 if std is."""
    if std == 0:
        return 0.0
    if not LIMITS[0] <= std <= LIMITS[1]:
        raise ValueError(f"a standard deviation of secure noise is 0 or within 2^-90 .. 2^90: std={std}")
    return math.ldexp(FRACTION, math.frexp(std)[1] - 1)


def box_muller(words: Tensor) -> Tensor:
    """Float64 normals [n, 8] of the blocks [16, n], in the order of the elements."""
    a, b, c, d = words.view(4, 4, -1).unbind(1)  # each [4, n]
    small = a == 0
    high, low = torch.where(small, b, a), torch.where(small, c, b)
    odd = (high << 31) + (low >> 1) | 1  # u = 2^-63 odd, or 2^-95 odd
    # near 1 the distance to 1 is what counts, and an integer still has it
    u = odd.double().mul_(2.0**-63).mul_(torch.where(small, 2.0**-32, 1.0))
    beside = ((1 << 62) - odd + (1 << 62)).double().mul_(-(2.0**-63))
    log = torch.where(u < 0.5, u.log(), beside.log1p())
    radius = log.mul_(-2.0).sqrt_()
    t = c.double().mul_(2.0**-32).masked_fill_(small, 0.0).add_(d).mul_(2 * math.pi * 2.0**-32)
    return torch.stack([radius * t.cos(), radius * t.sin()], -1).transpose(0, 1).reshape(-1, 8)


def secure_gaussian(
    shape: int | tuple[int, ...], key: Tensor, stream: int, dtype: torch.dtype = torch.float32, block: int = 0
) -> Tensor:
    """Standard normals of this shape on the key's device. key [5] int64, 0 <= stream < 2^32, at most 2^35 elements.
    They begin with that block, as those of a shard do."""
    word(stream)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    numel = math.prod(shape)
    countable(8 * block + numel)
    out = torch.empty((cdiv(numel, 8), 8), dtype=dtype, device=key.device)
    step = CHUNK * torch.get_num_threads() if key.device.type == "cpu" else max(len(out), 1)
    for first in range(0, len(out), step):
        rows = out[first : first + step]
        counter = torch.arange(block + first, block + first + len(rows), device=key.device)
        rows.copy_(box_muller(chacha.words(key, counter, stream)))
    return out.view(-1)[:numel].view(shape)


def reference(grad: Tensor, key: Tensor, stream: int, std: float, block: int = 0) -> Tensor:
    step = grid(std)
    if step == 0:
        return grad.clone(memory_format=torch.contiguous_format)
    total = secure_gaussian(grad.shape, key, stream, accumulator(grad), block).mul_(std).add_(grad)
    steps = total * (1 / step)  # exact, as it is a power of two, or infinite
    # a sum with so many steps is whole; adding zero makes 0 of -0, which would tell a sign
    return torch.where(steps.isinf(), total, steps.round().mul_(step).add_(0.0)).to(grad.dtype)


@dataclass(frozen=True)
class Spec:
    block: int = 128


def specialise(grad: Tensor, key: Tensor, stream: int, std: float) -> Spec:
    return Spec()


# box_muller(a, b, c, d, cosine, sine): two values, under these names, from four words.
#
# u 2^32 (or 2^64) is made of two words in float32, whose bits hold both the power of two and the rest m,
# sqrt(1/2) <= m < sqrt(2):
#     ln u = power ln 2 + ln m,  ln m = 2 artanh(f / (2 + f)),  f = m - 1
# Where the power is 0, -f is the distance to 1, which is made of the complements of the words. What is rounded away is
# 2^-24 of either, and the two bits that k leaves out are less. The series is off by 2e-9. Division and root are those
# of the hardware, off by two units in the last place: exact ones take as long as the rest.
#
# on_grid(total, out): a float32 below 2^23 is rounded to whole numbers by adding 2^23 and taking it away; one above is
# whole.
MACROS = f"""\
{{%- macro box_muller(a, b, c, d, cosine, sine) -%}}
small = {{{{ a }}}} == 0
high, low = tl.where(small, {{{{ b }}}}, {{{{ a }}}}), tl.where(small, {{{{ c }}}}, {{{{ b }}}})
scaled = (high.to(tl.float32) + low.to(tl.float32) * {2.0**-32!r}) + {2.0**-31!r}
bits = scaled.to(tl.int32, bitcast=True)
power = (bits - {0x3F3504F3}) >> 23
rest = (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0
power -= tl.where(small, 64, 32)
beside = ((high ^ 0xFFFFFFFF).to(tl.float32) + (low ^ 0xFFFFFFFF).to(tl.float32) * {2.0**-32!r}) + {2.0**-31!r}
f = tl.where(power == 0, beside * {-(2.0**-32)!r}, rest)
s = f / (2.0 + f)
s_2 = s * s
series = s * (2.0 + s_2 * ({2 / 3!r} + s_2 * ({2 / 5!r} + s_2 * ({2 / 7!r} + s_2 * {2 / 9!r}))))
log = power.to(tl.float32) * {math.log(2)!r} + series
radius = tl.sqrt(-2.0 * log)
{{{{ turned("radius", d, cosine, sine) }}}}
{{%- endmacro -%}}
{{%- macro draw_secure_normals(index, shape) -%}}
i = {{{{ index }}}}
{{{{ chacha_block("i") }}}}
{{{{ box_muller("w0", "w1", "w2", "w3", "cosine_0", "sine_0") }}}}
{{{{ box_muller("w4", "w5", "w6", "w7", "cosine_1", "sine_1") }}}}
{{{{ box_muller("w8", "w9", "w10", "w11", "cosine_2", "sine_2") }}}}
{{{{ box_muller("w12", "w13", "w14", "w15", "cosine_3", "sine_3") }}}}
# in the order of the elements: the last dimension that is joined varies fastest
cosines = tl.join(tl.join(cosine_0, cosine_2), tl.join(cosine_1, cosine_3))
sines = tl.join(tl.join(sine_0, sine_2), tl.join(sine_1, sine_3))
normals = tl.join(cosines, sines).reshape({{{{ shape }}}})
{{%- endmacro -%}}
{{%- macro on_grid(total, out) -%}}
steps = {{{{ total }}}} * tl.full([], per_grid, tl.float32)
size = tl.abs(steps)
whole = (size + 8388608.0) - 8388608.0
rounded = tl.where(steps < 0, -whole, whole) * tl.full([], grid, tl.float32) + 0.0
{{{{ out }}}} = tl.where(size < 8388608.0, rounded, {{{{ total }}}})
{{%- endmacro -%}}
"""

TEMPLATE = (
    chacha.MACROS
    + MACROS
    + """
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["noise_stream"])
def kernel(grad_ptr, key_ptr, noise_stream, std, grid, per_grid, out_ptr, N):
    first = tl.program_id(0).to(tl.int64) * {{ block }}
    {{ draw_secure_normals("first + tl.arange(0, %d)" % block, "%d, 8" % block) | indent(4) }}
    n = 8 * i[:, None] + tl.arange(0, 8)[None, :]
    grad = tl.load(grad_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    total = grad + tl.full([], std, tl.float32) * normals
    {{ on_grid("total", "noised") | indent(4) }}
    out = tl.where(per_grid > 0, noised, grad)  # 0 without noise: adding a zero would lose the sign of -0
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < N)
"""
)


def launch(grad: Tensor, key: Tensor, stream: int, std: float) -> Tensor:
    word(stream)
    step = grid(std)
    spec = specialise(grad, key, stream, std)
    programs = cdiv(countable(grad.numel()), 8 * spec.block)
    grad = grad.contiguous()  # elements are numbered in row-major order, whatever the layout
    out = torch.empty_like(grad)
    numbers = float(std), step, 1 / step if step else 0.0
    start(kernel(FAMILY, spec), programs, grad, grad, key, stream, *numbers, out, grad.numel())
    return out


def countable(numel: int) -> int:
    """`numel` if the blocks of so many elements can be numbered: ValueError otherwise."""
    if numel > 8 * chacha.BLOCKS:
        raise ValueError(f"secure noise has one counter for at most 2^35 elements of a tensor: {numel}")
    return numel


def example(case, dtype, device, generator):
    # away from zero, and little noise: a test allows for rounding in proportion to the sum, and for no grid
    grad = torch.randn(case, generator=generator)
    grad = (grad + grad.sign()).to(device=device, dtype=dtype)
    key = torch.tensor([-0x123456789ABCDEF0, 0x1F2345678, 2**63 - 1, -1, 5], device=device)
    return grad, key, 7, 2.0**-12


FAMILY = Family(
    name="add_secure_noise",
    schema="(Tensor grad, Tensor key, int stream, float std) -> Tensor",
    reference=reference,
    launch=launch,
    fake=fake,
    specialise=specialise,
    template=TEMPLATE,
    cases=((1, 1), (3, 5), (1,), (1025,), (63, 65), (0, 3), (2, 3, 4)),  # the shape of grad
    example=example,
)
