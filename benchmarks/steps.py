"""One training step: forward, backward, optimizer. What is timed and what is checked go through the same `backward`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import flashdp_compile
from benchmarks.check import check_noise
from benchmarks.settings import Settings
from benchmarks.workloads import Batch
from flashdp_compile.testing import replay_noise


def run_steps(step: "Step", batches: list[Batch], count: int) -> None:
    """`count` steps, on the batches in turn."""
    for i in range(count):
        step(batches[i % len(batches)])


@dataclass(frozen=True)
class Observed:
    """The gradients that a step computes, without noise, and for each parameter a bound on the norm of what adding and
    subtracting the noise has rounded away."""

    gradients: dict[str, Tensor]
    rounding: dict[str, float]


class Step:
    """A step that is not private. `forward` gives the losses [B] of a batch; the parameters are those of `model`."""

    def __init__(self, model: nn.Module, forward: Callable[..., Tensor], settings: Settings) -> None:
        self.model, self.forward, self.settings = model, forward, settings
        self.optimizer: Any = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, fused=settings.device == "cuda"
        )

    def losses(self, batch: Batch) -> Tensor:
        with self.settings.autocast():
            return self.forward(*batch)

    def backward(self, batch: Batch) -> Tensor:
        """Fills p.grad; gives the mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.losses(batch).mean()
        loss.backward()
        return loss.detach()

    def __call__(self, batch: Batch) -> Tensor:
        loss = self.backward(batch)
        self.optimizer.step()
        return loss

    def observe(self, batch: Batch) -> Observed:
        """The gradients of this very step, for the check; changes no weight."""
        self.backward(batch)
        gradients = self.gradients()
        return Observed(gradients, dict.fromkeys(gradients, 0.0))

    def gradients(self) -> dict[str, Tensor]:
        """{parameter name: a copy of p.grad}, zeros where there is none. CUDA graphs write the next step's over it."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self.model.named_parameters()
        }

    def complaint(self) -> str | None:
        """What went wrong during the timed steps, if anything did."""
        return None


class PrivateStep(Step):
    """A step of flashdp. `deviation` is that of its noise; `dropped` counts the samples that this process has dropped
    until its check was over."""

    deviation: float

    def __init__(self, model: nn.Module, forward: Callable[..., Tensor], settings: Settings) -> None:
        super().__init__(model, forward, settings)
        self.dropped = flashdp_compile.nonfinite_samples()

    def complaint(self) -> str | None:
        dropped = flashdp_compile.nonfinite_samples() - self.dropped
        return f"{dropped} samples were dropped as not finite, which saves work" if dropped else None


class FlashDPStep(PrivateStep):
    """torch.compile(model, backend="flashdp") with seeded noise, so that the check can subtract it."""

    def __init__(
        self,
        model: nn.Module,
        clipping: str,
        batch_size: int,
        settings: Settings,
        mode: str | None = None,
        **further: Any,
    ) -> None:
        options: Any = {
            "clipping": clipping,
            "max_grad_norm": settings.max_grad_norm,
            "noise_multiplier": settings.noise_multiplier,
            "expected_batch_size": batch_size,
            "compiler": settings.compiler,
            "mode": mode if settings.compiler == "inductor" else None,
            "seed": 1,
            **further,
        }
        forward = torch.compile(model, backend="flashdp", fullgraph=True, dynamic=False, options=options)
        super().__init__(model, forward, settings)
        self.deviation = settings.noise_multiplier * settings.max_grad_norm / batch_size

    def observe(self, batch: Batch) -> Observed:
        """Runs the compiled graph twice with the same noise. The second time the gradient that comes in is NaN, which
        drops every sample: what is released then is the noise alone."""
        replay_noise()
        self.backward(batch)
        released = self.gradients()
        replay_noise()
        self.optimizer.zero_grad(set_to_none=True)
        (self.losses(batch).mean() * float("nan")).backward()
        noise = self.gradients()
        self.dropped = flashdp_compile.nonfinite_samples()
        check_noise(noise, self.deviation)
        rounding = {name: 2.0**-23 * float(torch.linalg.vector_norm(n)) for name, n in noise.items()}
        return Observed({name: g - noise[name] for name, g in released.items()}, rounding)
