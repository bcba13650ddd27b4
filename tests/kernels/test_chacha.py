"""ChaCha20 against the vectors of RFC 8439, and against integers of Python; the twin and the kernel."""

import random
from dataclasses import dataclass

import pytest
import torch

from flashdp_compile.kernels import chacha, codegen, common
from flashdp_compile.kernels.family import Template

COUNTING = bytes(range(32))
# RFC 8439, section 2.3.2 and appendix A.1, test vectors 1 to 5: key, nonce, counter, words of the block
VECTORS = {
    "2.3.2": (
        COUNTING,
        "000000090000004a00000000",
        1,
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2",
    ),
    "A.1 1": (
        bytes(32),
        "000000000000000000000000",
        0,
        "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b "
        "7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2",
    ),
    "A.1 2": (
        bytes(32),
        "000000000000000000000000",
        1,
        "bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32 "
        "7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b",
    ),
    "A.1 3": (
        bytes(31) + b"\x01",
        "000000000000000000000000",
        1,
        "2452eb3a 9249f8ec 8d829d9b ddd4ceb1 e8252083 60818b01 f38422b8 5aaa49c9 "
        "bb00ca8e da3ba7b4 c4b592d1 fdf2732f 4436274e 2561b3c8 ebdd4aa6 a0136c00",
    ),
    "A.1 4": (
        b"\x00\xff" + bytes(30),
        "000000000000000000000000",
        2,
        "fb4dd572 4bc42ef1 df922636 327f1394 a78dea8f 5e269039 a1bebbc1 caf09aae "
        "a25ab213 48a6b46c 1b9d9bcb 092c5be6 546ca624 1bec45d5 87f47473 96f0992e",
    ),
    "A.1 5": (
        bytes(32),
        "000000000000000000000002",
        0,
        "374dc6c2 3736d58c b904e24a cd3f93ef 88228b1a 96a4dfb3 5b76ab72 c727ee54 "
        "0e0e978a f3145c95 1b748ea8 f786c297 99c28f5f 628314e8 398a19fa 6ded1b53",
    ),
}
# section 2.4.2: the key stream from counter 1 on, as bytes
STREAM_NONCE = "000000000000004a00000000"
STREAM = bytes.fromhex(
    "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06 e27e4fcaec9ef3cf788a3b0aa372600a92b57974cded2b"
    "9334794cba40c63e34cdea212c4cf07d41b769a6749f3f 630f4122cafe28ec4dc47e26d4346d70b98c73f3e9c53a"
    "c40c5945398b6eda1a832c89c167eacd901d7e2bf363"
)


def words_of(text: bytes) -> list[int]:
    return [int.from_bytes(text[n : n + 4], "little") for n in range(0, len(text), 4)]


def plain_block(key: list[int], counter: int, nonce: list[int]) -> list[int]:
    """The RFC's description once more, word by word."""
    start = [*words_of(b"expand 32-byte k"), *key, counter, *nonce]
    s = list(start)

    def quarter(a, b, c, d):
        for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) % 2**32
            mixed = s[z] ^ s[x]
            s[z] = (mixed << bits) % 2**32 + (mixed >> (32 - bits))

    for _ in range(10):
        quarter(0, 4, 8, 12), quarter(1, 5, 9, 13), quarter(2, 6, 10, 14), quarter(3, 7, 11, 15)
        quarter(0, 5, 10, 15), quarter(1, 6, 11, 12), quarter(2, 7, 8, 13), quarter(3, 4, 9, 14)
    return [(x + y) % 2**32 for x, y in zip(s, start, strict=True)]


BLOCKS = """
import triton
import triton.language as tl


@triton.jit
def kernel(counter_ptr, key_ptr, noise_stream, out_ptr, N):
    n = tl.arange(0, {{ block }})
    i = tl.load(counter_ptr + n, mask=n < N, other=0)
    {{ chacha_block("i", "w", "s") | indent(4) }}
    {% for word in range(16) %}
    tl.store(out_ptr + {{ word }} * N + n, w{{ word }}.to(tl.int64), mask=n < N)
    {% endfor %}
"""


@dataclass(frozen=True)
class Spec:
    block: int = 16


def by_kernel(key, counter, stream):
    out = torch.empty(16, len(counter), dtype=torch.int64, device=key.device)
    run = codegen.kernel(Template("chacha_blocks", chacha.MACROS + BLOCKS), Spec())
    common.start(run, 1, out, counter, key, stream, out, len(counter))
    return out


def signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


def key_and_stream(key: list[int], nonce: list[int], device="cpu"):
    """The arguments that make this key and this nonce."""
    pairs = [signed(key[n] + (key[n + 1] << 32)) for n in range(0, 8, 2)]
    step = signed(nonce[1] + (nonce[2] << 32))
    return torch.tensor([*pairs, step], device=device), nonce[0]


@pytest.mark.parametrize("path", [chacha.words, by_kernel])
@pytest.mark.parametrize("key, nonce, counter, answer", VECTORS.values(), ids=VECTORS)
def test_vectors_of_the_rfc(key, nonce, counter, answer, path, device):
    wanted = [int(word, 16) for word in answer.split()]
    key, nonce = words_of(key), words_of(bytes.fromhex(nonce))
    assert plain_block(key, counter, nonce) == wanted
    pairs, stream = key_and_stream(key, nonce, device)
    assert path(pairs, torch.tensor([counter], device=device), stream).flatten().tolist() == wanted


@pytest.mark.parametrize("path", [chacha.words, by_kernel])
def test_the_key_stream_of_the_rfc(path, device):
    pairs, stream = key_and_stream(words_of(COUNTING), words_of(bytes.fromhex(STREAM_NONCE)), device)
    blocks = path(pairs, torch.tensor([1, 2], device=device), stream)
    found = b"".join(word.to_bytes(4, "little") for word in blocks.T.flatten().tolist())
    assert found[: len(STREAM)] == STREAM and len(STREAM) == 114


@pytest.mark.parametrize("path", [chacha.words, by_kernel])
def test_any_words_at_all(path, device):
    """Blocks of one call do not mix, and every bit of key, stream, step and counter counts: high ones too."""
    draw = random.Random(0)
    key, nonce = ([draw.randrange(2**31, 2**32) for _ in range(n)] for n in (8, 3))
    counters = [draw.randrange(2**32) for _ in range(11)] + [0, 2**31, 2**32 - 1]
    pairs, stream = key_and_stream(key, nonce, device)
    found = path(pairs, torch.tensor(counters, device=device), stream)
    assert found.T.tolist() == [plain_block(key, counter, nonce) for counter in counters]
