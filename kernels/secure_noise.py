"""Secure noise: normals from ChaCha20, and a sum that is rounded to a grid. docs/secure-noise.md has the argument.

Elements 16 i .. 16 i + 15 of a tensor, in row-major order, come from blocks i and 2^31 + i of ChaCha20 (chacha.py),
whose words are w0 .. w15 and m0 .. m15. Elements 16 i + 2 p and 16 i + 2 p + 1 come from (a, d) = w2p, w2p+1 and from
(b, c) = m2p, m2p+1, by Box-Muller:

           a >= 2^12, nearly always          0 < a < 2^12                      a = 0
    u      2^-38 (k + 2^-32 (b + 1/2))       2^-64 (2^32 a + b + 1/2)          2^-96 (2^32 b + c + 1/2)
    t      2 pi 2^-26 (n + 2^-32 c)          2 pi 2^-32 (d + 2^-32 c)          2 pi 2^-32 d

Here k is a with the lower 6 bits of d behind it, n the upper 26 bits of d, and the values are radius cos t and radius
sin t for radius = sqrt(-2 ln u) <= 11.6. So u is uniform on (0, 1) in steps of 2^-70, of 2^-64 below 2^-20 and of 2^-96
below 2^-32; the radius of an exact normal exceeds the largest with probability 2^-97.

In float32 a value takes its further words only in the tail, a < 2^12, and there not for its angle: elsewhere they are
2^31. That moves a radius by 2^-39 / (u radius) at most, 1.3e-9 where it is 4 and 3.5e-7 next to the tail, and a value
by pi 2^-26 radius, 1.2e-7 where that is 2.5: about what rounding to float32 does. The grid is 10^4 times as wide. The
block with the tail's words is drawn where a program has a value in the tail, which is one program in 1024: words alone
decide it, and no gradient.

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
EACH = 16  # elements of a block
FURTHER = 1 << 31  # the number of the block with further words, behind that of the block: 2^35 elements have 2^31
TAIL = 1 << 12


def grid(std: float) -> float:
    """What released values are multiples of: the largest power of two not above std * 2^-8. 0 if std is."""
    if std == 0:
        return 0.0
    if not LIMITS[0] <= std <= LIMITS[1]:
        raise ValueError(f"a standard deviation of secure noise is 0 or within 2^-90 .. 2^90: std={std}")
    return math.ldexp(FRACTION, math.frexp(std)[1] - 1)


def box_muller(words: Tensor, more: Tensor) -> Tensor:
    """Float64 normals [n, 16] of the blocks [16, n] and those with their further words, in the order of elements."""
    a, d = words.view(8, 2, -1).unbind(1)  # each [8, n]
    b, c = (m.double() for m in more.view(8, 2, -1).unbind(1))
    tail = a < TAIL
    k = (a << 6) + (d & 63)
    below = (b + 0.5).mul_(2.0**-32)
    last = torch.where(a == 0, (c + 0.5) * 2.0**-32, 0.5)
    u = torch.where(tail, ((a << 32).double() + b + last) * 2.0**-64, (k + below) * 2.0**-38)
    # near 1 the distance to 1 is what counts, and an integer still has it
    beside = (((1 << 38) - 1 - k) + (1 - below)).mul_(-(2.0**-38))
    log = torch.where(u < 0.5, u.log(), beside.log1p())
    radius = log.mul_(-2.0).sqrt_()
    within = c.mul_(2.0**-32).masked_fill_(a == 0, 0.0)
    t = torch.where(tail, (d + within) * 2.0**-32, ((d >> 6) + within) * 2.0**-26).mul_(2 * math.pi)
    return torch.stack([radius * t.cos(), radius * t.sin()], -1).transpose(0, 1).reshape(-1, EACH)


def secure_gaussian(
    shape: int | tuple[int, ...], key: Tensor, stream: int, dtype: torch.dtype = torch.float32, block: int = 0
) -> Tensor:
    """Standard normals of this shape on the key's device. key [5] int64, 0 <= stream < 2^32, at most 2^35 elements.
    They begin with that block, as those of a shard do."""
    word(stream)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    numel = math.prod(shape)
    countable(EACH * block + numel)
    out = torch.empty((cdiv(numel, EACH), EACH), dtype=dtype, device=key.device)
    step = CHUNK * torch.get_num_threads() if key.device.type == "cpu" else max(len(out), 1)
    for first in range(0, len(out), step):
        rows = out[first : first + step]
        counter = torch.arange(block + first, block + first + len(rows), device=key.device)
        words = chacha.words(key, counter, stream)
        rows.copy_(box_muller(words, _further(words, key, counter, stream, dtype == torch.float64)))
    return out.view(-1)[:numel].view(shape)


def _further(words: Tensor, key: Tensor, counter: Tensor, stream: int, exact: bool) -> Tensor:
    """The further words [16, n] of blocks [16, n]; unless `exact`, of those alone in which a value needs them."""
    if exact:
        return chacha.words(key, counter + FURTHER, stream)
    more = torch.full_like(words, 1 << 31)
    tail = words[::2] < TAIL
    if words.is_cuda:  # without waiting for the device
        drawn = chacha.words(key, counter + FURTHER, stream)
        return torch.where(tail.repeat_interleave(2, 0), drawn, more)
    rows = tail.any(0).nonzero()[:, 0]
    drawn = chacha.words(key, counter[rows] + FURTHER, stream)
    more[:, rows] = torch.where(tail[:, rows].repeat_interleave(2, 0), drawn, more[:, rows])
    return more


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


# radius_of(scaled, power, beside, radius): sqrt(-2 ln u) under this name, for scaled = u 2^power in float32, whose bits
# hold both an exponent and the rest m, sqrt(1/2) <= m < sqrt(2):
#     ln u = exponent ln 2 + ln m,  ln m = 2 artanh(f / (2 + f)),  f = m - 1
# Where the exponent is 0, -f is the distance to 1, which `beside` is 2^32 times, made of the complements of the words.
# What is rounded away is 2^-24 of either. The series is off by 2e-9. Division and root are those of the hardware, off
# by two units in the last place: exact ones take as long as the rest.
#
# on_grid(total, out): a float32 below 2^23 is rounded to whole numbers by adding 2^23 and taking it away; one above is
# whole.
MACROS = f"""\
{{%- macro radius_of(scaled, power, beside, radius) -%}}
bits = ({{{{ scaled }}}}).to(tl.int32, bitcast=True)
exponent = (bits - {0x3F3504F3}) >> 23
f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
exponent -= {{{{ power }}}}
{{% if beside %}}
f = tl.where(exponent == 0, ({{{{ beside }}}}) * {-(2.0**-32)!r}, f)
{{% endif %}}
s = f / (2.0 + f)
s_2 = s * s
series = s * (2.0 + s_2 * ({2 / 3!r} + s_2 * ({2 / 5!r} + s_2 * ({2 / 7!r} + s_2 * {2 / 9!r}))))
{{{{ radius }}}} = tl.sqrt(-2.0 * (exponent.to(tl.float32) * {math.log(2)!r} + series))
{{%- endmacro -%}}
{{%- macro radius_of_words(a, d, radius) -%}}
six = ({{{{ d }}}} & 63).to(tl.float32) * {2.0**-6!r} + {2.0**-7!r}
{{{{ radius_of(a ~ ".to(tl.float32) + six", 32, "(" ~ a ~ " ^ 0xFFFFFFFF).to(tl.float32) + (1.0 - six)", radius) }}}}
{{%- endmacro -%}}
{{%- macro radius_of_tail(a, b, c, radius) -%}}
upper = {{{{ a }}}}.to(tl.float32) * {2.0**32!r} + {{{{ b }}}}.to(tl.float32)
{{{{ radius_of("upper + (" ~ c ~ ".to(tl.float32) * %r + %r)" % ({2.0**-32!r}, {2.0**-33!r}), 64, "", radius) }}}}
{{%- endmacro -%}}
{{%- macro angle_of_word(a, d) -%}}
tl.where({{{{ a }}}} < {TAIL}, {{{{ d }}}}, ({{{{ d }}}} & {0xFFFFFFC0}) + 32)
{{%- endmacro -%}}
{{%- macro draw_secure_normals(index, shape) -%}}
i = {{{{ index }}}}
{{{{ chacha_block("i", "w", "s") }}}}
{{% for p in range(8) %}}
{{{{ radius_of_words("w%d" % (2 * p), "w%d" % (2 * p + 1), "radius_%d" % p) }}}}
{{% endfor %}}
least = w0
{{% for p in range(1, 8) %}}
least = tl.minimum(least, w{{{{ 2 * p }}}})
{{% endfor %}}
if tl.min(least, 0) < {TAIL}:
    {{{{ chacha_block("(i + %d)" % {FURTHER}, "m", "t") | indent(4) }}}}
{{% for p in range(8) %}}
    {{{{ radius_of_tail("w%d" % (2 * p), "m%d" % (2 * p), "m%d" % (2 * p + 1), "far") | indent(4) }}}}
    radius_{{{{ p }}}} = tl.where(w{{{{ 2 * p }}}} < {TAIL}, far, radius_{{{{ p }}}})
{{% endfor %}}
{{% for p in range(8) %}}
turned_word = {{{{ angle_of_word("w%d" % (2 * p), "w%d" % (2 * p + 1)) }}}}
{{{{ turned("radius_%d" % p, "turned_word", "cosine_%d" % p, "sine_%d" % p) }}}}
{{% endfor %}}
# in the order of the elements: the last dimension that is joined varies fastest
{{% for name in ("cosine", "sine") %}}
{{{{ name }}}}s = {{{{ joined(name) }}}}
{{% endfor %}}
normals = tl.join(cosines, sines).reshape({{{{ shape }}}})
{{%- endmacro -%}}
{{%- macro joined(name) -%}}
{{%- set n = name ~ "_" -%}}
tl.join(
    tl.join(tl.join({{{{ n }}}}0, {{{{ n }}}}4), tl.join({{{{ n }}}}2, {{{{ n }}}}6)),
    tl.join(tl.join({{{{ n }}}}1, {{{{ n }}}}5), tl.join({{{{ n }}}}3, {{{{ n }}}}7)),
)
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
    {{ draw_secure_normals("first + tl.arange(0, %d)" % block, "%d, 16" % block) | indent(4) }}
    n = 16 * i[:, None] + tl.arange(0, 16)[None, :]
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
    programs = cdiv(countable(grad.numel()), EACH * spec.block)
    grad = grad.contiguous()  # elements are numbered in row-major order, whatever the layout
    out = torch.empty_like(grad)
    numbers = float(std), step, 1 / step if step else 0.0
    start(kernel(FAMILY, spec), programs, grad, grad, key, stream, *numbers, out, grad.numel())
    return out


def countable(numel: int) -> int:
    """`numel` if the blocks of so many elements can be numbered: ValueError otherwise."""
    if numel > EACH * FURTHER:
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
