"""Philox against its published vectors; the noise against the normal law, the kernel and its own claims."""

import math
from dataclasses import dataclass

import pytest
import torch

from flashdp_compile.kernels import codegen, common, gaussian
from flashdp_compile.kernels.add_noises import add_noises
from flashdp_compile.kernels.family import Template
from flashdp_compile.kernels.gaussian import philox, round_keys

# Known answers of Random123 for philox4x32 with ten rounds: counter, key, output
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def key_of(k, step=0, device="cpu"):
    signed = [(word + 2**63) % 2**64 - 2**63 for word in (k, step)]
    return torch.tensor(signed, dtype=torch.int64, device=device)


@pytest.mark.parametrize("counter, key, answer", VECTORS)
def test_known_answers(counter, key, answer, device):
    words = [torch.tensor(c, device=device) for c in counter]
    keys = round_keys(key_of(key[0] + (key[1] << 32), device=device)[0])
    assert tuple(w.item() for w in philox(*words, keys)) == answer


@pytest.mark.parametrize("counter, key, answer", VECTORS)
def test_the_counter_is_laid_out_as_documented(counter, key, answer, device):
    """Block 0 of the tensor, with the words of the vector where c0 = 0 allows: the first vector; else by the twin."""
    stream, step = counter[1], counter[2] + (counter[3] << 32)
    k = key_of(key[0] + (key[1] << 32), step, device)
    words = philox(torch.tensor(0), *map(torch.tensor, counter[1:]), round_keys(k[0].cpu()))
    expected = []
    for a, b in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log(a.item() * 2**-32 + 2**-33))
        expected += [radius * f(2 * math.pi * b.item() * 2**-32) for f in (math.cos, math.sin)]
    wanted = torch.tensor(expected, device=device)
    torch.testing.assert_close(gaussian.gaussian(4, k, stream), wanted, rtol=0, atol=2e-6)
    got = gaussian.launch(torch.zeros(4, device=device), k, stream, 1.0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_kernel_and_twin_agree_on_every_element(device):
    k = key_of(0xFEDCBA9876543210, 0x8000000180000001, device)
    twin = gaussian.gaussian(40_003, k, 0xFFFFFFFE)
    got = gaussian.launch(torch.zeros(40_003, device=device), k, 0xFFFFFFFE, 1.0)
    torch.testing.assert_close(got, twin, rtol=1e-6, atol=2e-6)


def test_the_law_is_normal(device):
    n = 1 << 20
    z = gaussian.gaussian(n, key_of(11, 3, device), 5).double()
    assert abs(z.mean()) < 5 / math.sqrt(n) and abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n) and abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    cdf = torch.special.ndtr(z.sort().values)
    grid = torch.arange(1, n + 1, dtype=torch.float64, device=device) / n
    assert (cdf - grid).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, level 0.001
    assert 4.5 < z.abs().max() < 6.8
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("other", [(12, 3, 5), (11 + 2**40, 3, 5), (11, 4, 5), (11, 3 + 2**40, 5), (11, 3, 6)])
def test_another_key_step_or_stream_is_other_noise(other):
    n = 1 << 16
    a = gaussian.gaussian(n, key_of(11, 3), 5)
    b = gaussian.gaussian(n, key_of(*other[:2]), other[2])
    assert abs((a * b).mean()) < 5 / math.sqrt(n) and (a != b).float().mean() > 0.999


def test_chunks_and_lengths_do_not_show(monkeypatch):
    whole = gaussian.gaussian(10_001, key_of(1), 2)
    assert torch.equal(gaussian.gaussian(777, key_of(1), 2), whole[:777])
    monkeypatch.setattr(gaussian, "CHUNK", 64)
    torch.testing.assert_close(gaussian.gaussian(10_001, key_of(1), 2), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["launch", "reference"])
def test_the_layout_of_the_gradient_does_not_show(path, device):
    grad, k = torch.randn(33, 17, device=device), key_of(5, device=device)
    run = getattr(gaussian, path)
    assert torch.equal(run(grad, k, 1, 0.3), run(grad.T.contiguous().T, k, 1, 0.3))
    assert torch.equal(run(grad, k, 1, 0.0), grad)


def test_the_sum_is_rounded_once(device):
    """A narrow gradient gets the float32 sum, not the sum of a rounded noise."""
    grad, k = torch.randn(1000, device=device).to(torch.bfloat16), key_of(5, device=device)
    exact = grad.float() + 0.3 * gaussian.gaussian(1000, k, 1)
    torch.testing.assert_close(gaussian.reference(grad, k, 1, 0.3).float(), exact, rtol=2.0**-8, atol=1e-7)


@pytest.mark.parametrize("stream", [-1, 2**32])
def test_a_stream_is_a_word(stream):
    with pytest.raises(ValueError, match="unsigned word of 32 bits"):
        gaussian.gaussian(4, key_of(1), stream)


TURNED = """
import triton
import triton.language as tl


@triton.jit
def kernel(word_ptr, cosine_ptr, sine_ptr, N):
    n = tl.arange(0, {{ block }})
    word = tl.load(word_ptr + n, mask=n < N, other=0).to(tl.uint32)
    {{ turned("3.0", "word", "cosine", "sine") | indent(4) }}
    tl.store(cosine_ptr + n, cosine, mask=n < N)
    tl.store(sine_ptr + n, sine, mask=n < N)
"""


@dataclass(frozen=True)
class Words:
    block: int = 128


def test_sine_and_cosine_in_every_quadrant_and_where_they_meet(device):
    eighths = [n * 2**29 + step for n in range(9) for step in (-(2**20), -1, 0, 1, 3**12)]
    words = torch.tensor([w % 2**32 for w in eighths], device=device)
    found = torch.empty(2, len(words), device=device)
    run = codegen.kernel(Template("turned", TURNED), Words())
    common.start(run, 1, found, words, found[0], found[1], len(words))
    angles = words.double() * (2 * math.pi * 2.0**-32)
    torch.testing.assert_close(found.double(), 3 * torch.stack([angles.cos(), angles.sin()]), rtol=2e-7, atol=3e-7)


def test_several_tensors_in_one_launch(device):
    key = torch.tensor([-0x123456789ABCDEF0, 0x1F2345678], device=device)
    grads = [torch.randn(shape, device=device) for shape in ((3, 5), (40, 65), (3, 5), (1,))]
    before, streams = [g.clone() for g in grads], [7, 1000010, 3, 2**32 - 1]
    add_noises(grads, key, streams, 0.5)
    for grad, start, stream in zip(grads, before, streams, strict=True):
        torch.testing.assert_close(grad, gaussian.reference(start, key, stream, 0.5), rtol=0, atol=2e-6)
