"""How clipped sums become releases, in the plain values that a graph holds: what rewrite follows and verify demands."""

from __future__ import annotations

from dataclasses import dataclass

from flashdp_compile.passes.groups import BoundsPlace


@dataclass(frozen=True)
class Mechanism:
    """What `Options` says about releases.

    `mean`: what backward is called on is a mean over the samples, and a release is divided by `expected_batch_size`, or
    by the size of the batch at hand where that is None. Places are the numbers by which compiled code knows what lives
    in the process: `grad_scaler`, the loss's GradScaler in runtime/scaling.py; `bounds`, those that move, in
    runtime/bounds.py; `held_probes`, the probes that all backward passes of a logical batch have in common, in
    runtime/probe_keys.py; `part_runs`, the parts of a model that have one bound together, in runtime/part_runs.py.
    `owed`: noise is added behind the graph, so sums leave it as wide as they were made.
    """

    noise_multiplier: float
    clip_fn: str
    mean: bool
    expected_batch_size: int | None
    seed: int | None
    grad_scaler: int | None = None
    bounds: BoundsPlace | None = None
    held_probes: int | None = None
    part_runs: int | None = None
    owed: bool = False

    @property
    def divides_by_batch(self) -> bool:
        """Whether the divisor L is the size of the batch at hand."""
        return self.mean and self.expected_batch_size is None
