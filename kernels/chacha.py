"""ChaCha20, the block function of RFC 8439 section 2.3: 16 words that nobody can predict without the key.

    state   4 constants, 8 words of key, counter, 3 words of nonce       all of 32 bits
    block   the state after 20 rounds, plus the state

Here a block is named by what is being drawn, so that no two draws of one key share one:

    key words     low and high word of key[0] .. key[3]       key = tensor int64 [5], read as unsigned
    counter       number of the block within the tensor
    nonce         stream, low word of key[4], high word of key[4]       key[4] is the step

A tensor has at most 2^32 blocks, a stream is one parameter's, and runtime/secure_key.py gives no step twice.
"""

import torch
from torch import Tensor

from flashdp_compile.kernels.philox import WORD

CONSTANTS = 0x61707865, 0x3320646E, 0x79622D32, 0x6B206574  # "expand 32-byte k"
BLOCKS = 1 << 32  # in one tensor


def chacha20(key: Tensor, counter: Tensor, nonce: Tensor) -> Tensor:
    """Blocks [16, n] for key [8], counter [n] and nonce [3]: words of 32 bits, held in int64."""
    n = len(counter)
    constants = torch.cat([key.new_full((1,), word) for word in CONSTANTS])
    fixed = [word[:, None].expand(-1, n) for word in (constants, key, nonce)]
    state = torch.cat([*fixed[:2], counter[None], fixed[2]])
    a, b, c, d = state.clone().view(4, 4, n)
    for _ in range(10):
        _quarters(a, b, c, d)  # of the columns
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        _quarters(a, b, c, d)  # of the diagonals
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return state.add_(torch.cat([a, b, c, d])).bitwise_and_(WORD)


def _quarters(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """Four quarter rounds [4, n] at once, in place: fresh memory would take as long as the arithmetic."""
    for total, term, turned, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        turned.bitwise_xor_(total.add_(term).bitwise_and_(WORD))
        low = turned >> (32 - bits)
        turned.bitwise_left_shift_(bits).bitwise_or_(low).bitwise_and_(WORD)


def words(key: Tensor, counter: Tensor, stream: int) -> Tensor:
    """The blocks [16, n] of a key [5], as the module names them. Stays on the key's device: no synchronisation."""
    halves = torch.stack([key & WORD, (key >> 32) & WORD], 1)  # [5, 2]
    return chacha20(halves[:4].flatten(), counter, torch.cat([key.new_full((1,), stream), halves[4]]))


COLUMNS = [(n, 4 + n, 8 + n, 12 + n) for n in range(4)]
DIAGONALS = [(n, 4 + (n + 1) % 4, 8 + (n + 2) % 4, 12 + (n + 3) % 4) for n in range(4)]


W, S = "{{ w }}", "{{ s }}"


def _quarter(a: int, b: int, c: int, d: int) -> str:
    """The quarter round of these four words, as source."""
    return "".join(
        f"    {W}{total} += {W}{term}\n    {W}{turned} ^= {W}{total}\n"
        f"    {W}{turned} = ({W}{turned} << {bits}) | ({W}{turned} >> {32 - bits})\n"
        for total, term, turned, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7))
    )


# chacha_block(index, w, s): the words w0 .. w15, each uint32 and shaped like `index`, an int64 tensor of numbers of
# blocks; s0 .. s15 is the state. Uses the parameters key_ptr and noise_stream.
MACROS = (
    "{%- macro chacha_block(index, w, s) -%}\n"
    "zero = ({{ index }} * 0).to(tl.uint32)\n"
    + "".join(f"{S}{n} = zero + {constant}\n" for n, constant in enumerate(CONSTANTS))
    + "".join(
        f"k = tl.load(key_ptr + {n})\n"
        f"{S}{4 + 2 * n}, {S}{5 + 2 * n} = zero + k.to(tl.uint32), zero + (k >> 32).to(tl.uint32)\n"
        for n in range(4)
    )
    + "step = tl.load(key_ptr + 4)\n"
    f"{S}12, {S}13 = ({{{{ index }}}}).to(tl.uint32), ({{{{ index }}}} * 0 + noise_stream).to(tl.uint32)\n"
    f"{S}14, {S}15 = zero + step.to(tl.uint32), zero + (step >> 32).to(tl.uint32)\n"
    + "".join(f"{W}{n} = {S}{n}\n" for n in range(16))
    + "for _ in range(10):\n"
    + "".join(_quarter(*four) for four in COLUMNS + DIAGONALS)
    + "".join(f"{W}{n} += {S}{n}\n" for n in range(16))
    + "{%- endmacro -%}\n"
)
