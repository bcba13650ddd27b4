"""A model inside DistributedDataParallel, whose sums an engine adds up over the processes, once for each step."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from flashdp_compile.errors import OptionError

_ALL_IN_ONE = "gradients are clipped and kept until an engine's step, which adds them up over all processes"


def hold_back(ddp: Any) -> None:
    """Keeps a DistributedDataParallel from averaging what its next backward leaves, as its `no_sync` does: there is
    nothing in p.grad yet. Raises OptionError if it was told to do more than that."""
    for name, on in (
        ("static_graph", ddp.static_graph),
        ("mixed_precision", getattr(ddp, "mixed_precision", None) is not None),
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
    ddp.require_backward_grad_sync = False
