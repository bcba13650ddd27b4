"""A training step by a PrivacyEngine: the noise is added by the optimizer's step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

import flashdp_compile
from benchmarks.check import check_noise
from benchmarks.settings import Settings
from benchmarks.steps import Observed, PrivateStep
from benchmarks.workloads import Batch
from flashdp_compile import PrivacyEngine, accounting


class _Nothing:
    """In the place of the engine's noise."""

    def add(
        self, totals: list[Tensor], step: int, streams: list[int], std: float, factors: Any = None, groups: Any = None
    ) -> list[Tensor]:
        return totals  # the bounds have not moved


class EngineStep(PrivateStep):
    """`arguments` are further ones of the engine."""

    def __init__(self, model: nn.Module, clipping: str, batch_size: int, settings: Settings, **arguments: Any) -> None:
        self.engine = PrivacyEngine(
            target_delta=1e-5,
            expected_batch_size=batch_size,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.max_grad_norm,
            clipping=clipping,
            sampling=accounting.Fixed(1000),
            options={"compiler": settings.compiler},
            **arguments,
        )
        super().__init__(model, self.engine.compile(model, dynamic=False), settings)
        self.engine.attach(self.optimizer)
        sigma = self.engine._steps._sigma_of_gradients()  # which also pays for moving bounds
        self.deviation = sigma * settings.max_grad_norm / batch_size

    def __call__(self, batch: Batch) -> Tensor:
        loss = super().backward(batch)
        self.optimizer.step()
        return loss

    def backward(self, batch: Batch) -> Tensor:
        """A whole step, without which there is no gradient, that changes no weight."""
        with self._still():
            return self(batch)

    def observe(self, batch: Batch) -> Observed:
        """A step without its noise, which is rounded to a grid too coarse to be subtracted; and the noise alone, of a
        step whose samples are all dropped because the gradient that comes in is NaN."""
        noise, self.engine._steps.noise = self.engine._steps.noise, _Nothing()
        self.backward(batch)
        self.engine._steps.noise = noise
        released = self.gradients()
        with self._still():
            self.optimizer.zero_grad(set_to_none=True)
            (self.losses(batch).mean() * float("nan")).backward()
            self.optimizer.step()
        self.dropped = flashdp_compile.nonfinite_samples()
        check_noise(self.gradients(), self.deviation)
        return Observed(released, dict.fromkeys(released, 0.0))

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Steps within change no weight, and are forgotten."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        yield
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.state.clear()
