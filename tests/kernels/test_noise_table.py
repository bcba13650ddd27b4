"""One launch for many tensors adds what an op adds to each of them."""

import pytest
import torch

from flashdp_compile.kernels import chacha, gaussian, secure_noise
from flashdp_compile.kernels.noise_table import Entry, NoiseTable, apart, fits

SIZES = [5, 1024, 3001, 8, 0, 1, 1023]
STD = 0.75


def tensors(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device) for size in SIZES]


def key_of(secure, device, step=5):
    return torch.tensor([1, 2**62, 3, 4, step] if secure else [2**62 + 1, step], device=device)


def each(grads, key, secure, factors=None):
    op = secure_noise.launch if secure else gaussian.launch
    noised = [op(grad, key, 10 + k, STD) for k, grad in enumerate(grads)]
    return noised if factors is None else [grad * factors[k % 2] for k, grad in enumerate(noised)]


def table(secure):
    return NoiseTable([Entry(size, 10 + k, k % 2) for k, size in enumerate(SIZES)], secure)


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_each_tensor_gets_what_the_op_adds(scaled, secure, device):
    factors = torch.tensor([2.0, 0.3], device=device) if scaled else None
    its = table(secure)
    for step in (1, 2):  # the second time the tensors are elsewhere
        grads, key = tensors(device), key_of(secure, device, step)
        expected = each(grads, key, secure, factors)
        its.add(grads, key, STD, factors)
        for found, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if not secure else 0)


@pytest.mark.parametrize("secure", [True, False])
def test_at_the_same_addresses_again(secure, device):
    its, grads = table(secure), tensors(device)
    before = [grad.clone() for grad in grads]
    for step in (1, 2):
        for grad, first in zip(grads, before, strict=True):
            grad.copy_(first)
        its.add(grads, key_of(secure, device, step), STD)
        for found, wanted in zip(grads, each(before, key_of(secure, device, step), secure), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_what_does_not_fit(device):
    zeros = torch.zeros(8, 8, device=device)
    assert fits(zeros) and not fits(zeros.T[:, :4]) and not fits(zeros.double()) and not fits(zeros.flatten()[1:])
    its = NoiseTable([Entry(64, 0, 0)], secure=True)
    for wrong in (zeros.double(), zeros[:4], zeros.flatten()[1:]):
        with pytest.raises(ValueError, match="tensors that fit"):
            its.add([wrong], key_of(True, device), STD)
    for stream in (-1, 2**32):
        with pytest.raises(ValueError, match="noise stream"):
            NoiseTable([Entry(64, stream, 0)], secure=True)


def test_apart():
    memory = torch.zeros(64)
    assert apart([memory[:32], memory[32:]]) and apart([memory[32:], memory[:32]]) and apart([memory])
    assert not apart([memory, memory[60:]]) and not apart([memory[:32], memory[31:]]) and not apart([memory, memory])


@pytest.mark.parametrize("secure", [True, False])
def test_shards_get_what_the_op_adds_to_the_whole(secure, device):
    """Each begins with a block of its own, and the last one is short, as those of a tensor on several ranks."""
    whole, key = torch.randn(3025, generator=torch.Generator().manual_seed(0)).to(device), key_of(secure, device)
    (expected,) = each([whole], key, secure)
    shards = [part.clone() for part in whole.split([1024, 1040, 944, 17])]
    firsts = [0, 1024, 2064, 3008]
    each_block = 16 if secure else 4
    entries = [Entry(len(part), 10, 0, first // each_block) for part, first in zip(shards, firsts, strict=True)]
    NoiseTable(entries, secure).add(shards, key, STD)
    torch.testing.assert_close(torch.cat(shards), expected, rtol=0, atol=0 if secure else 1e-6)


def test_a_program_draws_the_further_words_of_its_tail(device):
    """Block 10776916 of this key and stream has a word of 4: without further words its radius would be anyone's guess
    between 6.41 and 6.45."""
    key, block = torch.tensor([11, 12, 13, 14, 3], device=device), 10_776_916
    assert chacha.words(key.cpu(), torch.tensor([block]), 5)[::2].min() == 4
    grad = torch.zeros(3 * 16, device=device)
    NoiseTable([Entry(grad.numel(), 5, 0, block - 1)], secure=True).add([grad], key, 1.0)
    twin = secure_noise.reference(torch.zeros(3 * 16), key.cpu(), 5, 1.0, block - 1)
    exact = secure_noise.secure_gaussian(3 * 16, key.cpu(), 5, torch.float64, block - 1)
    assert exact[16:32].view(8, 2).norm(dim=1).max() > 6.4 and exact[:16].view(8, 2).norm(dim=1).max() < 5.27
    assert torch.equal(grad.cpu(), twin) and (twin - exact).abs().max() <= 0.51 * secure_noise.grid(1.0)
