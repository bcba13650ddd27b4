"""Steps of Opacus (on PyPI; tried with 1.6), eager: its hooks end every graph that torch.compile would make.

Imported only where it is installed.
"""

import warnings
from typing import Any

from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from benchmarks.settings import Settings
from benchmarks.steps import Observed, Step
from benchmarks.workloads import Batch


class OpacusStep(Step):
    """Hooks that store every sample's gradient, clipped by the optimizer; flat."""

    wrapper: Any = GradSampleModule
    wrapped_optimizer: Any = DPOptimizer

    def __init__(self, model: nn.Module, batch_size: int, settings: Settings) -> None:
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        if getattr(model, "checkpoint", False):
            model.checkpoint = False  # its hooks would record what is recomputed a second time
        super().__init__(model, self.wrapper(model, **self.wrapper_arguments(settings)), settings)
        self.optimizer = self.wrapped_optimizer(
            self.optimizer,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.max_grad_norm,
            expected_batch_size=batch_size,
        )

    def wrapper_arguments(self, settings: Settings) -> dict[str, Any]:
        return {}

    def observe(self, batch: Batch) -> Observed:
        """Clips and averages with the noise switched off for this one batch."""
        noise, self.optimizer.noise_multiplier = self.optimizer.noise_multiplier, 0.0
        self.backward(batch)
        self.optimizer.pre_step()
        self.optimizer.noise_multiplier = noise
        return Observed(self.gradients(), dict.fromkeys(self.gradients(), 0.0))


class OpacusGhostStep(OpacusStep):
    """Norms without gradients where Opacus can, then a second backward of the weighted losses; flat."""

    wrapper = GradSampleModuleFastGradientClipping
    wrapped_optimizer = DPOptimizerFastGradientClipping

    def wrapper_arguments(self, settings: Settings) -> dict[str, Any]:
        return {"max_grad_norm": settings.max_grad_norm, "use_ghost_clipping": True}

    def backward(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batch)
        DPTensorFastGradientClipping(self.forward, self.optimizer, losses, "mean").backward()
        return losses.detach().mean()
