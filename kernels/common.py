"""Small helpers that all families share: dtypes, layouts, launching."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRITON_NAMES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}


def accumulator(*operands: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one operand is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32


def widen(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands in their common accumulator dtype."""
    dtype = accumulator(*operands)
    return tuple(t.to(dtype) for t in operands)


PRODUCTS_AT_A_TIME = 1 << 22  # elements: 16 MB in float32


def sample_products(x: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(samples, x_b^T g_b for these) in runs, so that whoever asks gets the same bits and B x d x p is never held."""
    step = max(1, PRODUCTS_AT_A_TIME // max(1, x.shape[2] * g.shape[2]))
    for first in range(0, x.shape[0], step):
        run = slice(first, first + step)
        wide_x, wide_g = widen(x[run], g[run])
        yield run, wide_x.mT @ wide_g


def dot_dtype(*operands: Tensor) -> torch.dtype:
    """The dtype in which tiles of these operands meet in tl.dot."""
    return functools.reduce(torch.promote_types, (t.dtype for t in operands))


def dot_type(*operands: Tensor) -> str:
    """Triton's name of that dtype."""
    return TRITON_NAMES[dot_dtype(*operands)]


def inner(t: Tensor) -> bool:
    """True if the last dimension is contiguous: its stride then need not be passed."""
    return t.stride(-1) == 1


def pointer(t: Tensor) -> tuple:
    """A strided operand as kernel arguments, in the order of the template macro `args`."""
    return (t, *t.stride()[:-1]) if inner(t) else (t, *t.stride())


class Tiled(NamedTuple):
    """A kernel argument: a tensor that is read or written in blocks of this shape through a TMA descriptor."""

    tensor: Tensor
    block: list[int]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def start(kernel: Any, programs: int, anchor: Tensor, *args: Any, **settings: int) -> None:
    """Launch `programs` copies of a kernel on the device of `anchor`, or record it; nothing to do is no launch.
    Settings are Triton's: num_warps (4), num_stages (3), maxnreg."""
    if programs == 0:
        return
    from flashdp_compile.compat import start_kernel  # late: it loads Triton

    tensors = tuple(a.tensor if isinstance(a, Tiled) else a for a in args)
    blocks = {at: a.block for at, a in enumerate(args) if isinstance(a, Tiled)}
    start_kernel(kernel, programs, anchor.device, tensors, blocks, settings)


class Launch:
    """A kernel that is started with arguments of one geometry again and again, like `start`.

    To find what it has compiled for a few hundred arguments takes Triton longer than to launch it: it is asked once.
    """

    def __init__(self, kernel: Any, programs: int, **settings: int) -> None:
        self.kernel, self.programs, self.settings = kernel, programs, settings
        self.compiled: Any = None

    def __call__(self, anchor: Tensor, *args: Any) -> None:
        from flashdp_compile.compat import start_compiled, start_kernel  # late: they load Triton

        if self.compiled is None:
            self.compiled = start_kernel(self.kernel, self.programs, anchor.device, args, {}, self.settings)
        else:
            start_compiled(self.compiled, self.programs, anchor.device, args)


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: Any, generator: torch.Generator) -> Tensor:
    """Example data: drawn on the CPU, so that it is the same on every device."""
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def example_key(device: Any) -> Tensor:
    """An example key [2] of Philox, whose words use all their bits."""
    return torch.tensor([-0x123456789ABCDEF0, 0x1F2345678], device=device)


def random_ids(shape: tuple[int, ...], high: int, device: Any, generator: torch.Generator) -> Tensor:
    """Example ids in [-1, high): repeats and excluded entries included."""
    return torch.randint(-1, high, shape, generator=generator).to(device)
