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

_UNDER_WAY: dict[int, dict[Any, Future[Any]]] = {}  # by the kernel's id; kernels are kept by kernels/codegen.py


def compile_early(kernel: Any, device: torch.device, arguments: tuple[Any, ...], settings: Mapping[str, int]) -> None:
    """Compiles for a launch with these numbers and tensors like these, which may be fake. Triton 3.6, 3.7."""
    if not torch.cuda.is_available():
        return
    like = [_Like(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    known = _UNDER_WAY.setdefault(id(kernel), {})
    places = tuple(a.data_ptr() % 16 for a in like if isinstance(a, _Like))
    key = tuple(as_compiled(a) for a in arguments), places, tuple(settings.items())
    if key not in known:
        known[key] = _threads().submit(_compile, kernel, device, like, settings)


def as_compiled(value: Any) -> tuple[Any, ...] | None:
    """What Triton compiles a kernel for, but for a tensor's place: a number's type, whether it is 1, and whether 16
    divides it. None for what only Inductor understands."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype
    if hasattr(value, "get_dtype"):  # a tensor as Inductor writes it
        return "tensor", value.get_dtype()
    if type(value) is int:
        return "int", value == 1, value % 16 == 0, value.bit_length() > 31
    return ("float",) if type(value) is float else None


class _Like:
    """What Triton asks a tensor for. Fresh memory is aligned, so a place in it is as aligned as its offset."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> Any:
        return self._offset


def finish_early(kernel: Any) -> None:
    """Waits for what is under way. Errors are left to the launch, which compiles once more and raises them."""
    for future in under_way(kernel):
        future.exception()
    _UNDER_WAY.pop(id(kernel), None)


def under_way(kernel: Any) -> list[Future[Any]]:
    return list(_UNDER_WAY.get(id(kernel), {}).values())


def _compile(kernel: Any, device: torch.device, like: list[Any], settings: Mapping[str, int]) -> None:
    with torch.cuda.device(device):
        kernel.warmup(*like, grid=(1,), **settings)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="flashdp_early")
