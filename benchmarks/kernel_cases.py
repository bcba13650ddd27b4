"""Which kernels are timed, at which shapes, and the floor that each is held to.

A floor is the time of the best that the device is known to do, times what a kernel may take over it:

    gram, embedding_sqnorm      1.3 x the larger of operations / 600 TFLOP/s and bytes / 3 TB/s
    outer_store                 1.15 x torch.bmm of the same product
    weighted_matmul             1.10 x torch.mm of the same product
    product_sum, embedding_sum,
    add_noise                   bytes / (0.8 x the bandwidth of a copy, measured in the same run)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RATE, BANDWIDTH = 600e12, 3e12  # of one H100: operations and bytes per second that a good kernel reaches
COPY_SHARE = 0.8


@dataclass(frozen=True)
class Shape:
    """x [B, T, d] is the input of a linear layer, g [B, T, p] the gradient of its output. Where p is a vocabulary, the
    kernels of embeddings are timed as well."""

    name: str
    B: int
    T: int
    d: int
    p: int
    vocabulary: bool = False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qkv", 16, 1024, 768, 2304),
        Shape("fc", 16, 1024, 768, 3072),
        Shape("fc2", 16, 1024, 3072, 768),
        Shape("proj", 16, 1024, 768, 768),
        Shape("short", 64, 256, 768, 2304),
        Shape("llama", 4, 1024, 2048, 8192),
        Shape("llama-long", 2, 4096, 2048, 8192),
        Shape("vit", 64, 197, 768, 3072),
        Shape("head", 16, 1024, 768, 50257, vocabulary=True),
        Shape("head-padded", 16, 1024, 768, 50304, vocabulary=True),
        Shape("llama-head", 4, 1024, 2048, 32000, vocabulary=True),
        Shape("tiny", 3, 17, 16, 24, vocabulary=True),  # for tests on a CPU
    )
}


@dataclass(frozen=True)
class KernelCase:
    """One call of one family. The floor is `allowance` times the time of `baseline()`, or of a roofline if None.

    `memory_only` takes the bandwidth of a measured copy for the roofline instead of operations and BANDWIDTH.
    """

    family: str
    shape: str
    arguments: tuple
    allowance: float
    flops: float = 0.0
    bytes: float = 0.0
    baseline: Callable[[], Any] | None = None
    memory_only: bool = False

    def roofline_s(self, copy_bandwidth: float) -> float:
        """Seconds of the roofline, from bytes per second of a copy."""
        if self.memory_only:
            return self.bytes / copy_bandwidth
        return max(self.flops / RATE, self.bytes / BANDWIDTH)


def cases(shape: Shape, device: str) -> Iterator[KernelCase]:
    """The cases of one shape, made one at a time: some hold gigabytes. Random data in bfloat16, as autocast gives."""
    B, T, d, p = shape.B, shape.T, shape.d, shape.p
    torch.manual_seed(0)
    x = torch.randn(B, T, d, device=device, dtype=torch.bfloat16)
    g = torch.randn(B, T, p, device=device, dtype=torch.bfloat16)
    weights = torch.rand(B, device=device) + 0.1
    operands = 2 * B * T * (d + p)
    pairs = B * T * (T + 1)  # two operations for each pair t <= u and column

    yield KernelCase("gram_sqnorm", shape.name, (x, [g], [False]), 1.3, pairs * (d + p), operands)
    yield KernelCase("outer_store", shape.name, (x, g), 1.15, baseline=lambda: torch.bmm(x.mT, g))
    flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)

    def product_of_all() -> Tensor:
        return torch.mm(flat_x.T, flat_g)

    key = torch.tensor([123456789, 7], device=device)
    noise = key, 3, 0.5  # as in a step
    yield KernelCase("weighted_matmul", shape.name, (x, g, weights, *noise), 1.1, baseline=product_of_all)

    if shape.vocabulary:
        ids = torch.randint(0, p, (B, T), device=device)
        read = 2 * B * T * d
        yield KernelCase("embedding_sqnorm", shape.name, (ids, x), 1.3, 3 * B * T * d, read)
        yield _elementwise("embedding_sum", shape, (ids, x, weights, p, *noise), read + 4 * p * d)

    gradient = torch.randn(d, p, device=device)
    yield _elementwise("add_noise", shape, (gradient, *noise), 8 * d * p)
    del gradient
    product: Tensor = torch.randn(B, d, p, device=device, dtype=torch.bfloat16)
    yield _elementwise("product_sum", shape, (product, weights, *noise), 2 * B * d * p + 4 * d * p)


def _elementwise(family: str, shape: Shape, arguments: tuple, moved: float) -> KernelCase:
    return KernelCase(family, shape.name, arguments, 1 / COPY_SHARE, bytes=moved, memory_only=True)
