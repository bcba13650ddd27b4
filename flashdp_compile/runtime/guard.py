"""Fails closed: a gradient that did not come out of one compiled, clipped and noised backward is never stepped on.

torch.compile falls back to eager code for many reasons, most of them silent: the recompile limit, a stance, suppressed
errors, a graph break, a parameter used outside of the compiled region. One rule covers them all. Every run of a
compiled backward is a *release* and leaves a receipt on each parameter that it fills; before an optimizer steps, every
gradient must be exactly one release, untouched by anything else, and the same one for all of its parameters. (An engine
holds sums that lack their noise, logical.py, and leaves the receipt at its step; a model in parts makes a release of
each.)

    backend:    guard.install(); guard.protect(parameters); return guard.wrap(compiled, ReleaseInfo(label=...))
    any step:   one release: goes on. Anything else: gradients set to None, UnprotectedGradientError

Not seen: changes made in place between backward and step (clip_grad_norm_, scaling; adding an unprotected gradient in
place looks the same), optimizers that do not derive from torch.optim.Optimizer, and updates made by hand.
"""

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flashdp_compile.runtime.check import BACKEND_MARK, before_step
from flashdp_compile.runtime.outputs import unseen, wrap
from flashdp_compile.runtime.release import LEDGER, Owed, ReleaseInfo
from flashdp_compile.runtime.watch import watch

__all__ = [
    "Owed",
    "ReleaseInfo",
    "install",
    "mark_backend",
    "protect",
    "releases",
    "reset",
    "unseen",
    "wrap",
]

F = TypeVar("F", bound=Callable[..., object])
_installing = threading.Lock()
_installed = False


def install() -> None:
    """Puts the check before every step of every torch optimizer of this process. Further calls do nothing."""
    global _installed
    with _installing:
        if not _installed:
            register_optimizer_step_pre_hook(before_step)
            _installed = True


def mark_backend(backend: F) -> F:
    """Marks a dynamo backend as ours, so that modules given to it are protected even before their first compilation."""
    setattr(backend, BACKEND_MARK, True)
    return backend


def protect(named_parameters: Mapping[str, Tensor]) -> None:
    """Makes parameters known, by their full names, from now on; frozen ones are skipped until they are compiled again.

    The backend calls this before it compiles, so that they stay protected even if the compilation fails. It is right
    to name all parameters of the model, those outside of the compiled region too.
    """
    for name, parameter in named_parameters.items():
        watch(parameter, name)


def releases() -> int:
    """How many releases were made in this process so far, stepped on or not. Each one spends privacy."""
    return LEDGER.count()


def reset() -> None:
    """Voids all receipts, for torch._dynamo.reset(). What was protected stays so; old gradients are not stepped on."""
    LEDGER.void()
