"""What is asked of torch.distributed and DistributedDataParallel beyond what they promise. Checked on 2.11 and 2.13."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["adding_up", "compile_in_place", "running_ddp", "unsplit_ddp_graphs", "wait_of"]


def running_ddp() -> Any:
    """The DistributedDataParallel whose forward is running, or None."""
    if not dist.is_available():
        return None
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._active_ddp_module


def compile_in_place(module: torch.nn.Module, **settings: Any) -> None:
    """`module.compile(**settings)`, also for the classes of torch.nn, whose own calls dynamo does not trace."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **settings)


def unsplit_ddp_graphs() -> bool:
    """Has dynamo compile what a DistributedDataParallel runs as one graph; whether it would have cut it into several,
    at the sizes of its buckets."""
    import torch._dynamo.config as config

    split = config.optimize_ddp in (True, "ddp_optimizer")
    if split:
        config.optimize_ddp = False  # type: ignore[assignment]
    return split


def wait_of(device: torch.device) -> timedelta | None:
    """How long the default group waits for other ranks on a device; None if it does not say."""
    backend = dist.group.WORLD._get_backend(device) if dist.group.WORLD is not None else None
    return getattr(getattr(backend, "options", None), "_timeout", None)


def adding_up(tensors: list[torch.Tensor], group: Any) -> Callable[[], None]:
    """Begins to replace tensors of one device and dtype by their sums over all ranks, in one operation where there is
    one. What it gives waits for them, on a GPU its stream and not the host."""
    if tensors[0].is_cuda:
        from torch.distributed.distributed_c10d import _coalescing_manager

        with _coalescing_manager(group, tensors[0].device, async_ops=True) as pending:
            for tensor in tensors:
                dist.all_reduce(tensor, group=group)
        return pending.wait
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]  # gloo

    def wait() -> None:
        for work in works:
            work.wait()

    return wait
