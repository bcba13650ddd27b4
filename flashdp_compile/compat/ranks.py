"""What is asked of torch.distributed and DistributedDataParallel beyond what they promise. Checked on 2.11 and 2.13."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_WORD = "flashdp: what has happened on rank"


def running_ddp() -> Any:
    """The DistributedDataParallel whose forward is running, or None."""
    if not dist.is_available():
        return None
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._active_ddp_module


def more_than_averaging(ddp: Any) -> str:
    """What a DistributedDataParallel is to do beyond averaging gradients over all ranks; empty if that is all."""
    told = {
        "static_graph": ddp.static_graph,
        "mixed_precision": getattr(ddp, "mixed_precision", None) is not None,
        "join()": ddp._join_config.enable,  # who has ended would wait for what nobody sends
        "delay_all_reduce_named_params": ddp._delay_all_reduce_all_params,
        "optimize_ddp='python_reducer'": getattr(ddp, "_use_python_reducer", False),
        "a process_group of some ranks": ddp.process_group.size() != dist.get_world_size(),
    }
    return next((name for name, is_so in told.items() if is_so), "")


def has_comm_hook(ddp: Any) -> bool:
    return bool(ddp._comm_hooks)


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


def came_of_waiting(error: BaseException) -> bool:
    """Whether torch.distributed has raised it, as it does where other ranks do not come."""
    if isinstance(error, dist.DistError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "torch/distributed" in trace.tb_frame.f_code.co_filename.replace("\\", "/")


def leave_word(text: str) -> None:
    """Writes down what has happened on this rank where others find it, whatever they wait for. They may be gone."""
    if (store := _store()) is not None:
        with contextlib.suppress(RuntimeError):
            store.set(f"{_WORD} {dist.get_rank()}", text)


def words_left() -> list[str]:
    """What ranks have written down, as far as it can be had."""
    found: list[str] = []
    if (store := _store()) is not None:
        with contextlib.suppress(RuntimeError):
            for rank in range(dist.get_world_size()):
                if store.check([key := f"{_WORD} {rank}"]):
                    found.append(f"rank {rank}: {store.get(key).decode()}")
    return found


def _store() -> Any:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return dist.distributed_c10d._get_default_store()
