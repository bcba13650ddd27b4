"""What a run of private steps reveals: epsilon and delta, for the sampling that was really used.

    accounting.epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1000, delta=1e-5)
    accounting.noise_multiplier(target_epsilon=8.0, sample_rate=0.01, steps=1000, delta=1e-5)

Sampling other than Poisson's goes by name: `sampling=accounting.Fixed(steps_per_epoch=100)`. Norms that are estimated
go by theirs: `norm="hutchinson", probes=64`.
"""

from flashdp_compile.accounting.budget import ACCOUNTANTS, epsilon, noise_multiplier, schedule
from flashdp_compile.accounting.randomized import NORMS
from flashdp_compile.accounting.ratio_law import BOUNDS
from flashdp_compile.accounting.sampling import (
    Fixed,
    Poisson,
    Sampling,
    Schedule,
    TruncatedPoisson,
    WithoutReplacement,
)

__all__ = [
    "ACCOUNTANTS",
    "BOUNDS",
    "NORMS",
    "Fixed",
    "Poisson",
    "Sampling",
    "Schedule",
    "TruncatedPoisson",
    "WithoutReplacement",
    "epsilon",
    "noise_multiplier",
    "schedule",
]
