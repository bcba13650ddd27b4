"""Secure noise: the words of ChaCha20 become normals as documented, and the sum lies on the grid."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from test_chacha import plain_block

from flashdp_compile.kernels import chacha, codegen, common, gaussian, secure_noise
from flashdp_compile.kernels.family import Template
from flashdp_compile.kernels.secure_noise import box_muller, grid, secure_gaussian

PATHS = ("launch", "reference")
N = 1 << 20


def key_of(*words, step=0, device="cpu"):
    return torch.tensor([*words, *[0] * (4 - len(words)), step], device=device)


@pytest.fixture(autouse=True)
def same_gradients():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def draws():
    """A million normals of one key, step and stream, in float64."""
    return secure_gaussian(N, key_of(11, 12, 13, 14, step=3), 5, torch.float64)


def minus_log(a: int, b: int, c: int, d: int) -> float:
    """-ln u, from the docstring of the module: u is a fraction of integers, and so is its distance to 1."""
    half = Fraction(1, 2)
    if a == 0:
        u = (2**32 * b + c + half) / 2**96
    elif a < 2**12:
        u = (2**32 * a + b + half) / 2**64
    else:
        u = (2**6 * a + d % 2**6 + (b + half) / 2**32) / 2**38
    return -math.log1p(-float(1 - u)) if 2 * u > 1 else -math.log(u)


def documented(element: int, key: list[int], stream: int, step: int) -> float:
    """One value, from the same docstring, by integers and floats of Python."""
    words = [half for k in key for half in (k % 2**32, k // 2**32)]
    nonce = [stream, step % 2**32, step // 2**32]
    number, p = element // 16, element % 16 // 2
    a, d = plain_block(words, number, nonce)[2 * p :][:2]
    b, c = plain_block(words, 2**31 + number, nonce)[2 * p :][:2]
    within = c / 2**32 if a else 0
    t = 2 * math.pi * ((d + within) / 2**32 if a < 2**12 else (d // 2**6 + within) / 2**26)
    radius = math.sqrt(2 * minus_log(a, b, c, d))
    return radius * (math.sin(t) if element % 2 else math.cos(t))


@pytest.mark.parametrize("path", PATHS)
def test_each_element_has_the_value_that_is_documented(path, device):
    key, stream, step = [2**62 + 1, 2, 2**40, 5], 0xFFFFFFFE, 2**61 + 2**35 + 3
    wanted = torch.tensor([documented(n, key, stream, step) for n in range(2100)], dtype=torch.float64)
    twin = secure_gaussian(2100, key_of(*key, step=step), stream, torch.float64)
    torch.testing.assert_close(twin, wanted, rtol=1e-13, atol=1e-14)
    run, state = getattr(secure_noise, path), key_of(*key, step=step, device=device)
    got = run(torch.zeros(3, 7, 100, device=device), state, stream, 1.0).flatten().cpu()
    assert ((got - wanted).abs() <= 2.0**-9 + 1e-5).all()


VALUES = """
import triton
import triton.language as tl


@triton.jit
def kernel(word_ptr, out_ptr, N):
    n = tl.program_id(0) * {{ block }} + tl.arange(0, {{ block }})
    {% for name in "abcd" %}
    {{ name }} = tl.load(word_ptr + {{ loop.index0 }} * N + n, mask=n < N, other=1).to(tl.uint32)
    {% endfor %}
    {{ radius_of_words("a", "d", "radius") | indent(4) }}
    {{ radius_of_tail("a", "b", "c", "far") | indent(4) }}
    radius = tl.where(a < 4096, far, radius)
    word = {{ angle_of_word("a", "d") }}
    {{ turned("radius", "word", "cosine", "sine") | indent(4) }}
    tl.store(out_ptr + n, cosine, mask=n < N)
    tl.store(out_ptr + N + n, sine, mask=n < N)
"""


@dataclass(frozen=True)
class Spec:
    block: int = 1024


def values(words):
    """Float64 values [n, 2] of words (a, b, c, d) [4, n]."""
    a, b, c, d = words
    return box_muller(torch.stack([a, d]).repeat(8, 1), torch.stack([b, c]).repeat(8, 1))[:, :2]


def both(words, device):
    """Values [2, n] of words [4, n], by the kernel and by the twin."""
    found = torch.empty(2, words.shape[1], device=device)
    run = codegen.kernel(Template("box_muller", secure_noise.MACROS + VALUES), Spec())
    common.start(run, common.cdiv(words.shape[1], 1024), found, words.contiguous().to(device), found, words.shape[1])
    return found.cpu(), values(words).T


def test_kernel_and_twin_agree_on_every_value(device):
    """Where b and c are what float32 takes them for, and in the tail, where it reads them."""
    words = chacha.words(key_of(1), torch.arange(25_000), 2).view(4, 4, -1).transpose(0, 1).reshape(4, -1)
    words[0, ::5] >>= 20
    words[1:3] = torch.where(words[0] < 4096, words[1:3], 2**31)
    found, exact = both(words, device)
    torch.testing.assert_close(found.double(), exact, rtol=5e-7, atol=4e-8)
    words[1:3] = torch.where(words[0] < 4096, words[1:3], torch.randint(2**32, (2, words.shape[1])))
    radius = values(words).norm(dim=1, keepdim=True).T
    allowed = 4e-7 * values(words).T.abs() + math.pi * 2.0**-26 * radius + 4e-7 * (radius > 5)  # docs/secure-noise.md
    assert ((found.double() - values(words).T).abs() <= allowed + 2e-8).all()


FULL = 2**32 - 1
# a, b, c, d: the neighbourhoods of 1, sqrt(1/2), 1/2 and the tail, where formulas meet, and all ends
CRAFTED = [
    (FULL, 2**31, 0, 63),
    (FULL, 2**31, 0, 0),
    (2**32 - 2**20, 2**31, 0, 0),
    (3037000500, 2**31, 0, 0),
    (3037000499, 2**31, 0, 0),
    (2**31, 2**31, 0, 0),
    (2**31 - 1, 2**31, 0, 63),
    (2**12, 2**31, 0, 0),
    (2**12 - 1, FULL, FULL, 0),
    (2**12 - 1, 0, 0, 0),
    (1, 0, 0, 0),
    (0, FULL, FULL, 0),
    (0, 2**20, 7, 0),
    (0, 1, 0, 0),
    (0, 0, FULL, 0),
    (0, 0, 0, 0),
]


def test_radii_are_right_from_one_end_to_the_other(device):
    words = torch.tensor(CRAFTED).T
    wanted = torch.tensor([math.sqrt(2 * minus_log(*each)) for each in CRAFTED], dtype=torch.float64)
    for found in both(words, device):
        torch.testing.assert_close(found.double().norm(dim=0), wanted, rtol=3e-7, atol=0)
    assert wanted[0] == pytest.approx(2.0**-19, rel=1e-9) and wanted[-3] > 9.4 and 11.59 < wanted[-1] < 11.60


def test_a_bit_serves_the_radius_or_the_angle():
    """Never both, or the two would depend on each other."""
    plain, tail, end = (2**20, 2**31, 2**31, 2**29 + 5), (2, 2**31, 2**31, 2**29 + 5), (0, 2**10, 2**31, 2**29 + 5)
    angles = {plain: {(2, 31), (3, 6), (3, 31)}, tail: {(2, 31), (3, 0), (3, 31)}, end: {(3, 0), (3, 31)}}
    radii = {
        plain: {(0, 31), (0, 12), (1, 31), (3, 5)},
        tail: {(0, 11), (0, 0), (1, 31), (1, 4)},
        end: {(1, 31), (1, 0), (2, 31)},
    }
    for words in angles:
        turned, moved = set(), set()
        for place in range(4):
            for bit in range(32):
                changed = list(words)
                changed[place] ^= 1 << bit
                if [changed[0] < 2**12, changed[0] == 0] != [words[0] < 2**12, words[0] == 0]:
                    continue
                found = values(torch.tensor([words, changed]).T)
                radius, angle = found.norm(dim=1), torch.atan2(found[:, 1], found[:, 0])
                if abs(angle[1] - angle[0]) > 1e-13:
                    turned.add((place, bit))
                if abs(radius[1] / radius[0] - 1) > 1e-13:
                    moved.add((place, bit))
        assert not turned & moved and angles[words] <= turned and radii[words] <= moved


def test_the_largest_radius_reaches_the_gradient(device, monkeypatch):
    """Words that ChaCha20 will not give in a lifetime, through the whole twin."""
    monkeypatch.setattr(chacha, "words", lambda key, counter, stream: torch.zeros(16, len(counter), dtype=torch.int64))
    out = secure_noise.reference(torch.ones(16), key_of(1), 2, 4.0)
    assert out.tolist() == [1 + 4 * 11.59765625, 1.0] * 8


def test_the_law_is_normal(draws):
    cdf = torch.special.ndtr(draws.sort().values)
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    distance = max((cdf - steps[1:]).abs().max(), (cdf - steps[:-1]).abs().max())
    assert distance < 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov, level 0.001
    moments = {1: 0, 2: 1, 3: 0, 4: 3, 5: 0, 6: 15}
    for power, moment in moments.items():
        deviation = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)
        assert abs((draws**power).mean() - moment) < 5 * deviation / math.sqrt(N), power


@pytest.mark.parametrize("bound", [0.001, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_tails_have_their_weight(draws, bound, sign):
    expected = N * math.erfc(bound / math.sqrt(2)) / 2
    assert abs((sign * draws > bound).sum() - expected) < 5 * math.sqrt(expected)


def test_neighbours_do_not_go_together(draws):
    for lag in (*range(1, 34), 1024, 16 * 128):
        for power in (1, 2):
            first, second = (part**power - float(power == 2) for part in (draws[lag:], draws[:-lag]))
            assert abs((first * second).mean()) < 5 * power / math.sqrt(N), (lag, power)


OTHERS = [
    pytest.param([11, 12, 13, 14], 4, 5, id="step"),
    pytest.param([11, 12, 13, 14], 3 + 2**40, 5, id="high word of step"),
    pytest.param([11, 12, 13, 14], 3, 6, id="stream"),
    *[
        pytest.param(
            [k + (n == word) * 2**shift for n, k in enumerate((11, 12, 13, 14))], 3, 5, id=f"key {word} {shift}"
        )
        for word in range(4)
        for shift in (0, 40)
    ],
]


@pytest.mark.parametrize("words, step, stream", OTHERS)
def test_another_key_step_or_stream_is_other_noise(draws, words, step, stream):
    n = 1 << 17
    other = secure_gaussian(n, key_of(*words, step=step), stream, torch.float64)
    assert abs((draws[:n] * other).mean()) < 5 / math.sqrt(n) and not (draws[:n] == other).any()


def test_chunks_and_lengths_do_not_show(monkeypatch):
    whole = secure_gaussian(10_001, key_of(1), 2)
    assert torch.equal(secure_gaussian(777, key_of(1), 2), whole[:777])
    monkeypatch.setattr(secure_noise, "CHUNK", 64)
    torch.testing.assert_close(secure_gaussian(10_001, key_of(1), 2), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_the_layout_of_the_gradient_does_not_show(path, device):
    grad, key, run = torch.randn(33, 17, device=device), key_of(5, device=device), getattr(secure_noise, path)
    assert torch.equal(run(grad, key, 1, 0.3), run(grad.T.contiguous().T, key, 1, 0.3))
    assert torch.equal(run(grad, key, 1, 0.3), run(grad, key, 1, 0.3))


@pytest.mark.parametrize(
    "std, step", [(1.0, 2**-8), (0.999, 2**-9), (1.999, 2**-8), (3e-5, 2**-24), (0.0, 0), (-0.0, 0)]
)
def test_the_grid_is_a_power_of_two(std, step):
    assert grid(std) == step


@pytest.mark.parametrize("std", [-1.0, 2.0**-91, 2.0**91, math.inf, math.nan])
@pytest.mark.parametrize("path", PATHS)
def test_a_deviation_without_a_grid_is_refused(std, path):
    with pytest.raises(ValueError, match=re.escape(f"std={std}")):
        getattr(secure_noise, path)(torch.ones(1), key_of(1), 2, std)


@pytest.mark.parametrize("std", [0.7, 2.0**-90, 2.0**90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_released_lies_on_the_grid(std, dtype, path, device):
    if path == "launch" and dtype == torch.float64:
        pytest.skip("the kernel has no float64")
    if dtype == torch.float16 and std != 0.7:
        pytest.skip("beyond float16")
    scales = std * torch.tensor([0.0, 1e-6, 1.0, 100.0, 3000.0, 2.0**16])
    scales = scales.clamp(max=60000 / 4) if dtype == torch.float16 else scales
    grad = (scales[:, None] * torch.randn(6, 171)).to(device=device, dtype=dtype)
    steps = getattr(secure_noise, path)(grad, key_of(3, device=device), 1, std).double() / grid(std)
    assert torch.equal(steps, steps.round())
    assert steps[:4].unique().numel() > 500  # and they are not few
    if dtype not in (torch.float16, torch.bfloat16):
        assert {n % 16 for n in steps[4].long().tolist()} == set(range(16))  # even beyond 2^19 steps, all of them


@pytest.mark.parametrize("path", PATHS)
def test_sums_are_rounded_to_the_nearest_point(path, device):
    """Each within half a step of the sum, on either side alike, and half a step goes to an even one."""
    grad, key, run = torch.randn(4099, device=device), key_of(4, device=device), getattr(secure_noise, path)
    exact = grad.double() + secure_gaussian(4099, key, 1, torch.float64)
    error = (run(grad, key, 1, 1.0) - exact) / grid(1.0)
    assert error.abs().max() < 0.5 + 1e-3 and abs(error.mean()) < 5 * math.sqrt(1 / 12 / 4099)
    assert abs(error.square().mean() * 12 - 1) < 0.1
    # noise of 2^-90 is nothing beside these, but has 2^-98 for a grid: the sum has no more than a few steps
    tiny = torch.tensor([2.0**20, -(2.0**20), 3e38, -3e38, 2.0**-40], device=device)
    assert torch.equal(run(tiny, key, 1, 2.0**-90), tiny)


@pytest.mark.parametrize("path", PATHS)
def test_zero_has_no_sign(path, device):
    """Whether the sum was a little above or below is not to be seen."""
    grad = torch.zeros(8 * 1024, device=device)
    out = getattr(secure_noise, path)(grad, key_of(3, device=device), 1, 1.0)
    assert (out == 0).sum() > 5 and not torch.signbit(out[out == 0]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 341), (1025,), (5, 1, 411), (0,), ()])
def test_kernel_and_twin_release_the_same(shape, dtype, device):
    """But for sums that lie halfway between two points, to the last place."""
    grad = torch.randn(shape).to(device=device, dtype=dtype)
    args = grad, key_of(-1, -(2**63), 3, 2**63 - 1, step=2**62 - 1, device=device), 2**32 - 1, 0.3
    got, twin = secure_noise.launch(*args), secure_noise.reference(*args)
    assert got.dtype == twin.dtype == dtype and got.shape == twin.shape == shape
    differing = got != twin
    assert differing.sum() <= 2 and (got.double() - twin.double()).abs().max() <= grid(0.3) if differing.any() else True


def test_a_double_gradient_is_summed_in_double():
    grad = torch.randn(5000, dtype=torch.float64) * 1e9  # where a float32 has 64 for a unit, and a float64 2^-23
    out = secure_noise.reference(grad, key_of(4), 1, 1.0)
    exact = grad + secure_gaussian(5000, key_of(4), 1, torch.float64)
    assert (out - exact).abs().max() <= 2.0**-9 and (out - exact).abs().max() > 0.99 * 2.0**-9


@pytest.mark.parametrize("path", PATHS)
def test_without_noise_nothing_is_rounded(path, device):
    grad = torch.tensor([0.1, 1e-40, 3e38, math.inf, -math.inf, math.nan, 1 / 3, -7.7, *[-0.0] * 20], device=device)
    out = getattr(secure_noise, path)(grad, key_of(1, device=device), 2, 0.0)
    assert torch.equal(out.view(torch.int32), grad.view(torch.int32)) and out.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays(path, device):
    grad = torch.tensor([math.inf, 1.0, -math.inf, math.nan], device=device)
    out = getattr(secure_noise, path)(grad, key_of(1, device=device), 2, 0.5)
    assert out[[0, 2]].tolist() == [math.inf, -math.inf] and out[1].isfinite() and out[3].isnan()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [-1, 2**32])
def test_a_stream_is_a_word(stream, path):
    with pytest.raises(ValueError, match="unsigned word of 32 bits"):
        getattr(secure_noise, path)(torch.ones(4), key_of(1), stream, 0.5)


@pytest.mark.parametrize("path", PATHS)
def test_blocks_have_a_counter_of_32_bits(path):
    """2^35 elements have 2^31 of them, and as many with further words: one more would be the first of these."""
    secure_noise.countable(2**35)
    with pytest.raises(ValueError, match="at most 2\\^35 elements"):
        getattr(secure_noise, path)(torch.ones(1).expand(2**35 + 1), key_of(1), 2, 0.5)


def test_it_is_not_the_noise_of_philox():
    a, b = secure_gaussian(4096, key_of(11), 5), gaussian.gaussian(4096, torch.tensor([11, 0]), 5)
    assert abs((a * b).mean()) < 5 / 64
