"""Logical batches: clipped sums of micro-batches that are added up, and become one release when their noise is added.

Between two steps a sum lives here and not in p.grad, so that a loop may clear its gradients after each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from flashdp_compile.runtime.check import examine, refuse
from flashdp_compile.runtime.release import LEDGER, Owed, Release, ReleaseInfo
from flashdp_compile.runtime.watch import Content, Fault, find

Noise = Callable[[int, Tensor], Tensor]
"""(place of the parameter in its optimizer, clipped sum) -> the same with its noise."""


class LogicalBatch:
    """What the backward passes since the last release have left for the parameters of one optimizer.

    `divisor` is what their sums must have been divided by; `owed` is the noise that they lack, once there is one.
    `used` counts the batches of a loader that went into earlier ones, for whoever draws samples.
    """

    def __init__(self, optimizer: Optimizer, divisor: float) -> None:
        self.optimizer, self.divisor = optimizer, divisor
        self.owed: Owed | None = None
        self.used = 0
        self.releases: dict[Release, None] = {}
        self._sums: dict[int, Tensor] = {}

    def take(self) -> int:
        """Moves the gradients here; the number of backward passes whose sums are held now.

        Raises UnprotectedGradientError, and forgets the logical batch, unless every gradient is a clipped sum,
        untouched since, and all owe the same noise.
        """
        found = examine(self.optimizer, owed=True)
        for index, content in found.clean:
            assert content.owed is not None
            self.owed = self.owed or content.owed
            if content.owed != self.owed or content.owed.divisor != self.divisor:
                found.faults.setdefault(Fault.FOREIGN, []).append(index)
        if found.faults:
            self.clear()
            refuse(self.optimizer, found)
        self.releases.update(dict.fromkeys(found.releases))
        with torch.no_grad():
            for index, _ in found.clean:
                parameter, watched = found.pairs[index]
                grad = parameter.grad
                assert grad is not None and watched is not None
                if (held := self._sums.get(index)) is None:
                    self._sums[index] = grad
                else:
                    held += grad
                parameter.grad = None
                watched.forget()
        return len(self.releases)

    def release(self, label: str, noise: Noise) -> None:
        """Puts the sums, with their noise, into p.grad, as one release."""
        release = LEDGER.open(ReleaseInfo(label=label))
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            held = self._sums.pop(index, None)
            if held is None:
                continue
            parameter.grad = noise(index, held)
            watched = find(parameter)
            assert watched is not None
            watched.content = Content(parameter.grad, release, None, ())
        self.clear()

    def clear(self) -> None:
        """Forgets what has been taken."""
        self.owed = None
        self.releases.clear()
        self._sums.clear()
