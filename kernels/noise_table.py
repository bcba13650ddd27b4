"""Noise onto any number of tensors in one launch, in place, found by a table of addresses.

    grad_k <- noised(grad_k, stream_k) * factor_k        noised: add_secure_noise, or add_noise (`secure` or not)

The tensors are float32, contiguous and apart from each other. To launch a kernel for each of them takes the host longer
than the noise takes the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashdp_compile.kernels import chacha, secure_noise
from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import cdiv, start
from flashdp_compile.kernels.family import Template
from flashdp_compile.kernels.gaussian import word

ALIGNED = 16  # bytes that a thread loads and stores at once


@dataclass(frozen=True)
class Spec:
    secure: bool
    factors: bool
    block: int = 128

    @property
    def elements(self) -> int:
        """Of one program."""
        return self.block * (secure_noise.EACH if self.secure else 4)


class Entry(NamedTuple):
    """A tensor: its elements, its stream, which of the factors is its own, and the block of noise that it begins with:
    that of a shard is in the middle of what the whole tensor gets."""

    elements: int
    stream: int
    factor: int = 0
    block: int = 0


# A row of the table: address, number of elements, stream, first program, number of the factor, first block.
TEMPLATE = Template(
    "noise_table",
    chacha.MACROS
    + secure_noise.MACROS
    + """
{%- set each = 16 if secure else 4 -%}
import triton
import triton.language as tl


@triton.jit
def kernel(table_ptr, owner_ptr, key_ptr, factor_ptr, std, grid, per_grid):
    program = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * 6
    grad_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.multiple_of(grad_ptr, 16)
    N, noise_stream = tl.load(row + 1), tl.load(row + 2)
    first = (program - tl.load(row + 3)) * {{ block }}
    shard = tl.load(row + 5)
{% if secure %}
    {{ draw_secure_normals("shard + first + tl.arange(0, %d)" % block, "%d, 16" % block) | indent(4) }}
{% else %}
    {{ draw_normals("shard + first + tl.arange(0, %d)" % block, "%d, 4" % block) | indent(4) }}
{% endif %}
    n = {{ each }} * (i - shard)[:, None] + tl.arange(0, {{ each }})[None, :]
    grad = tl.load(grad_ptr + n, mask=n < N, other=0.0)
    out = grad + tl.full([], std, tl.float32) * normals
{% if secure %}
    {{ on_grid("out", "out") | indent(4) }}
{% endif %}
{% if factors %}
    out = out * tl.load(factor_ptr + tl.load(row + 4))
{% endif %}
    tl.store(grad_ptr + n, out, mask=n < N)
""",
)


class NoiseTable:
    """The launches for tensors of the same sizes, again and again: what stays the same is made once."""

    def __init__(self, tensors: Sequence[Entry], secure: bool) -> None:
        self._secure = secure
        sizes = [entry.elements for entry in tensors]
        for entry in tensors:
            secure_noise.countable(secure_noise.EACH * entry.block + entry.elements)
        programs = [cdiv(size, Spec(secure, False).elements) for size in sizes]
        starts = [0, *itertools.accumulate(programs)]
        self._rows = [
            [0, entry.elements, word(entry.stream), start, entry.factor, entry.block]
            for entry, start in zip(tensors, starts, strict=False)
        ]
        self._owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(programs))
        self._addresses: tuple[int, ...] = ()
        self._table = torch.empty(0)

    def add(self, grads: Sequence[Tensor], key: Tensor, std: float, factors: Tensor | None = None) -> None:
        """Adds noise of deviation std > 0 to each, in place. key as of add_secure_noise or add_noise, factors float32
        [groups] on the same device. Does not wait for it.

        They are on one device, and apart from each other. Raises ValueError unless all of them fit.
        """
        addresses = tuple(grad.data_ptr() for grad in grads)
        if not all(fits(grad) and grad.numel() == row[1] for grad, row in zip(grads, self._rows, strict=True)):
            raise ValueError("a table of noise is for tensors that fit, of the sizes that it was made for")
        device = grads[0].device
        if addresses != self._addresses or self._table.device != device:  # an allocator gives the same again and again
            rows = [[address, *row[1:]] for address, row in zip(addresses, self._rows, strict=True)]
            # from memory that is not pinned, so the driver has its copy when this returns
            self._table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
            self._owner = self._owner.to(device)
            self._addresses = addresses
        step = secure_noise.grid(std) if self._secure else 1.0
        spec = Spec(self._secure, factors is not None)
        arguments = self._table, self._owner, key, key if factors is None else factors, float(std), step, 1 / step
        start(kernel(TEMPLATE, spec), len(self._owner), grads[0], *arguments)


def fits(grad: Tensor) -> bool:
    """Whether a tensor may be in a table, on a device for which Triton compiles."""
    return grad.dtype == torch.float32 and grad.is_contiguous() and grad.data_ptr() % ALIGNED == 0


def apart(grads: Sequence[Tensor]) -> bool:
    """Whether no two of these contiguous tensors have an element in common."""
    spans = sorted((grad.data_ptr(), grad.data_ptr() + grad.numel() * grad.element_size()) for grad in grads)
    return all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
