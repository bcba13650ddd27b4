"""A model inside DistributedDataParallel, whose sums an engine adds up over the processes, once for each step."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist
from torch import nn

from flashdp_compile.errors import OptionError

_ALL_IN_ONE = "gradients are clipped and kept until an engine's step, which adds them up over all processes"

_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by engines
_found_whole: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # replicas of nothing else


def was_compiled_whole(module: nn.Module) -> None:
    """Remembers that an engine has compiled a module, so that it clips the gradients of all of its parameters."""
    _compiled.add(module)


def hold_back(ddp: Any) -> None:
    """Keeps a DistributedDataParallel from averaging what its next backward leaves, as its `no_sync` does: there is
    nothing in p.grad yet. Raises OptionError if it has more to do than that."""
    for name, on in (
        ("static_graph", ddp.static_graph),
        ("mixed_precision", getattr(ddp, "mixed_precision", None) is not None),
        ("join()", ddp._join_config.enable),  # who has ended would wait for what nobody sends
        ("delay_all_reduce_named_params", ddp._delay_all_reduce_all_params),
        ("optimize_ddp='python_reducer'", getattr(ddp, "_use_python_reducer", False)),
        ("a process_group of some ranks", ddp.process_group.size() != dist.get_world_size()),
    ):
        if on:
            raise OptionError(f"DistributedDataParallel has {name}, which has no use here: {_ALL_IN_ONE}. Leave it out")
    if ddp._comm_hooks:  # mixed precision has one, too
        raise OptionError(
            f"DistributedDataParallel has a communication hook, which would not be called: {_ALL_IN_ONE}. What a hook "
            "changes would change the sensitivity, too; register none"
        )
    if ddp not in _found_whole:
        if public := _not_compiled(ddp):
            raise OptionError(
                f"DistributedDataParallel has {public}, too, which is trained, and which no engine has compiled: "
                f"{_ALL_IN_ONE}, so it averages nothing, not even what is public. Give what is compiled, and what is "
                "public, a DistributedDataParallel each, or freeze the latter before"
            )
        _found_whole.add(ddp)
    ddp.require_backward_grad_sync = False


def _not_compiled(ddp: Any) -> str | None:
    """A parameter that it would average, and that belongs to nothing that an engine has compiled."""
    compiled = {id(p) for module in ddp.module.modules() if module in _compiled for p in module.parameters()}
    return next(
        (
            name
            for name, p in ddp.module.named_parameters()
            if p.requires_grad and id(p) not in compiled and name not in ddp.parameters_to_ignore
        ),
        None,
    )
