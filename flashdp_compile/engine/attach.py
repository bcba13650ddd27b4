"""Puts an engine between an optimizer and its own step, on the optimizer itself: hooks cannot leave a step out."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from flashdp_compile.errors import OptionError, UnprotectedGradientError

_MARK = "_flashdp_engine"

Instead = Callable[[Callable[[], Any]], None]
"""(the optimizer's own step): what a step does."""


def check_optimizer(optimizer: Any) -> None:
    """Raises OptionError unless `optimizer` steps on gradients that are there before, and is nobody's yet."""
    if not isinstance(optimizer, Optimizer):
        raise OptionError(f"optimizer is a {type(optimizer).__name__}; allowed: a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise OptionError("SparseAdam takes sparse gradients, and private ones are dense: take Adam")
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if len(set(listed)) < len(listed):
        raise OptionError("optimizer lists a parameter twice")
    if getattr(optimizer.step, _MARK, None) is not None:
        raise OptionError("optimizer is attached to another PrivacyEngine")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OptionError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, and each evaluation would be "
            "a release: take an optimizer that needs one gradient"
        )


def replace_step(optimizer: Optimizer, engine: Any, instead: Instead) -> None:
    """Lets `optimizer.step(closure)` evaluate the closure, if there is one, and then call `instead`.

    A method, as learning rate schedulers wrap it and look for its function.
    """
    original, held = optimizer.step, weakref.ref(engine)

    @functools.wraps(original)
    @torch.compiler.disable
    def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None, **more: Any) -> Any:
        alive = held()
        if alive is None:
            raise UnprotectedGradientError("the PrivacyEngine of this optimizer is gone: keep it as long as you train")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        instead(functools.partial(original, **more))
        return loss

    setattr(step, _MARK, held)
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
