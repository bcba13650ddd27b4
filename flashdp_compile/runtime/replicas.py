"""A model inside DistributedDataParallel, whose sums an engine adds up over the processes, once for each step."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from flashdp_compile.compat import has_comm_hook, more_than_averaging
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
    if name := more_than_averaging(ddp):
        raise OptionError(f"DistributedDataParallel has {name}, which has no use here: {_ALL_IN_ONE}. Leave it out")
    if has_comm_hook(ddp):  # mixed precision has one, too
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
