"""Lets fully_shard add up gradients from where they lie. Checked on 2.11 and 2.13.

It copies the gradients of a part into one tensor, in which the rows of each rank lie together, and reduces that. The
rows of a rank lie together in each gradient by itself as well, and NCCL reduces several tensors in one launch: the
copy, which reads and writes every sum once, can be left out.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def stays_in_place(grad: Tensor) -> Tensor:
    """A gradient that nobody writes to until it is reduced: `in_place_reduce_scatter` takes it from where it lies."""
    return _InPlace(grad)


def reduces_as_usual(reduce_scatter: Any) -> bool:
    """Whether it is that of fully_shard, or the one below."""
    return type(reduce_scatter) in (_usual(), type(in_place_reduce_scatter()))


class _InPlace(Tensor):
    """What fully_shard is given for a gradient: the same, except that it is not copied."""

    own: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, grad: Tensor) -> _InPlace:
        return torch.Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=grad.stride(), dtype=grad.dtype, device=grad.device
        )

    def __init__(self, grad: Tensor) -> None:
        self.own = grad

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(lambda x: x.own if isinstance(x, _InPlace) else x, (args, kwargs or {}))
        if str(func) == "fsdp.chunk_cat.default" and in_place_reduce_scatter().takes(*args, **kwargs):
            return None
        return func(*args, **kwargs)


@functools.cache
def _usual() -> type:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    return DefaultReduceScatter


@functools.cache
def in_place_reduce_scatter() -> Any:
    """What fully_shard is to reduce gradients with (set_custom_reduce_scatter): one for all modules, as it reduces one
    module's after the other's."""

    from torch.distributed.distributed_c10d import _coalescing_manager

    class InPlaceReduceScatter(_usual()):  # type: ignore[misc]
        _taken: tuple[Any, list[Tensor]] | None = None
        _made: Callable[[], Tensor | None] = staticmethod(lambda: None)  # what it was last asked for, while it is there

        def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
            made = super().allocate(*args, **kwargs)
            self._made = weakref.ref(made)
            return made

        def takes(self, tensors: list[Tensor], dim: int, num_chunks: int, *, out: Tensor) -> bool:
            """Whether it reduces `tensors` in the place of `out` [ranks, elements of one], which is let go of then; not
            if another one has made that, and will reduce it."""
            made = self._made()
            if made is None or made.untyped_storage()._cdata != out.untyped_storage()._cdata:
                return False
            if dim != 0 or num_chunks == 1 or any(tensor.dtype != out.dtype for tensor in tensors):
                return False
            self._taken = out.untyped_storage(), [_of_even_rows(tensor, num_chunks) for tensor in tensors]
            out.untyped_storage().resize_(0)
            return True

        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
        ) -> Any:
            taken, self._taken = self._taken, None
            if taken is None or taken[0]._cdata != input_tensor.untyped_storage()._cdata:
                return super().__call__(output_tensor, input_tensor, group, op, async_op)
            inputs = taken[1]
            outputs = output_tensor.split([one.numel() // group.size() for one in inputs])
            together = _coalescing_manager(group, output_tensor.device) if output_tensor.is_cuda else nullcontext()
            with together:  # gloo has none
                for output, one in zip(outputs, inputs, strict=True):
                    super().__call__(output, one, group, op)
            vars(input_tensor)["taken"] = inputs  # kept by fully_shard until all of it is read
            return None

    return InPlaceReduceScatter()


def _of_even_rows(tensor: Tensor, ranks: int) -> Tensor:
    """As it is if all ranks have as many rows of it, or with rows of zeros at its end, in one dimension."""
    if missing := -tensor.shape[0] % ranks:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor.contiguous().view(-1)
