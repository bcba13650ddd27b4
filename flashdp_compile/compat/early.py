"""Kernels that Triton compiles in threads of its own, while Inductor is still at work, for launches to come.

Inductor compiles the kernels that its code launches in processes of its own. A kernel that an op launches would wait
for the first step, and stop it for seconds.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["compile_early", "finish_early"]

_UNDER_WAY: dict[int, list[Future[Any]]] = {}  # by the kernel's id; kernels are kept by kernels/codegen.py


def compile_early(kernel: Any, device: torch.device, arguments: tuple[Any, ...], settings: Mapping[str, int]) -> None:
    """Compiles for a launch with these numbers and tensors like these, which may be fake. Triton 3.6, 3.7."""
    if not torch.cuda.is_available():
        return
    # Triton takes a dtype for an aligned tensor of it
    kinds = [a.dtype if isinstance(a, torch.Tensor) else a for a in arguments]
    _UNDER_WAY.setdefault(id(kernel), []).append(_threads().submit(_compile, kernel, device, kinds, settings))


def finish_early(kernel: Any) -> None:
    """Waits for what is under way. Errors are left to the launch, which compiles once more and raises them."""
    for future in under_way(kernel):
        future.exception()
    _UNDER_WAY.pop(id(kernel), None)


def under_way(kernel: Any) -> list[Future[Any]]:
    return _UNDER_WAY.get(id(kernel), [])


def _compile(kernel: Any, device: torch.device, kinds: list[Any], settings: Mapping[str, int]) -> None:
    with torch.cuda.device(device):
        kernel.warmup(*kinds, grid=(1,), **settings)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="flashdp_early")
