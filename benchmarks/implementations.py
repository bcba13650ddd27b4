"""Who runs the workloads. Adding one is an entry here and, if its step is its own, a class like those in steps.py.

FastDP and FlashDP's review code have no entry: neither is on a registry, and no checkout was at hand to try one with.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.engine_steps import EngineStep
from benchmarks.settings import Settings
from benchmarks.steps import FlashDPStep, Step
from flashdp_compile import Quantile
from flashdp_compile.kernels import hopper

GRAPHS = "reduce-overhead"
PROBES = 64  # of estimated norms
STILL = Quantile(rate=1e-9)  # the check knows no bounds that move, and the cost is the same
Make = Callable[[nn.Module, int, Settings], Step]  # model, batch size, settings


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """`clipping` is "flat", "per_layer" or None (not private); `needs` names a module that must be importable.
    `probes`: how many norms are estimated from, None for exact ones."""

    name: str
    clipping: str | None
    make: Make
    needs: str | None = None
    batched_positions: bool = False
    probes: int | None = None

    @property
    def leeway(self) -> float:
        """How far clipped sums may be from those by exact norms: five deviations of the estimate of a gradient of rank
        one, whose squared norm is off by sqrt(2 / probes)."""
        return 0.0 if self.probes is None else 2.5 * (2 / self.probes) ** 0.5

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


def _eager(model: nn.Module, batch_size: int, settings: Settings) -> Step:
    return Step(model, model, settings)


def _compile(mode: str | None = None) -> Make:
    def make(model: nn.Module, batch_size: int, settings: Settings) -> Step:
        backend = "inductor" if settings.compiler == "inductor" else "aot_eager"
        options = {"mode": mode} if mode is not None and backend == "inductor" else {}
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False, **options)
        return Step(model, compiled, settings)

    return make


def _flashdp(clipping: str, mode: str | None = None, triton: bool = False, **options: Any) -> Make:
    def make(model: nn.Module, batch_size: int, settings: Settings) -> Step:
        if triton:
            hopper.available = lambda device: False  # each implementation has a process of its own
        return FlashDPStep(model, clipping, batch_size, settings, mode, **options)

    return make


def _probed(clipping: str) -> Make:
    return _flashdp(clipping, norm="hutchinson", probes=PROBES)


def _engine(clipping: str, **arguments: Any) -> Make:
    def make(model: nn.Module, batch_size: int, settings: Settings) -> Step:
        return EngineStep(model, clipping, batch_size, settings, **arguments)

    return make


def _opacus(name: str) -> Make:
    def make(model: nn.Module, batch_size: int, settings: Settings) -> Step:
        from benchmarks import opacus_steps  # late: needs opacus

        return getattr(opacus_steps, name)(model, batch_size, settings)

    return make


_ALL = (
    Implementation(name="eager", clipping=None, make=_eager),
    Implementation(name="compile", clipping=None, make=_compile()),
    Implementation(name="flashdp-flat", clipping="flat", make=_flashdp("flat")),
    Implementation(name="flashdp-per_layer", clipping="per_layer", make=_flashdp("per_layer")),
    # without the kernels of kernels/hopper, as on other devices
    Implementation(name="flashdp-flat-triton", clipping="flat", make=_flashdp("flat", triton=True)),
    Implementation(name="flashdp-per_layer-triton", clipping="per_layer", make=_flashdp("per_layer", triton=True)),
    # launched by CUDA graphs, so that the host has no say
    Implementation(name="compile-graphs", clipping=None, make=_compile(GRAPHS)),
    Implementation(name="flashdp-flat-graphs", clipping="flat", make=_flashdp("flat", GRAPHS)),
    Implementation(name="flashdp-per_layer-graphs", clipping="per_layer", make=_flashdp("per_layer", GRAPHS)),
    # norms estimated from Gaussian probes
    Implementation(name="flashdp-flat-probes", clipping="flat", make=_probed("flat"), probes=PROBES),
    Implementation(name="flashdp-per_layer-probes", clipping="per_layer", make=_probed("per_layer"), probes=PROBES),
    # noise at the step, by a PrivacyEngine
    Implementation(name="engine-flat", clipping="flat", make=_engine("flat")),
    Implementation(name="engine-flat-philox", clipping="flat", make=_engine("flat", noise="philox")),
    Implementation(name="engine-flat-quantile", clipping="flat", make=_engine("flat", bounds=STILL)),
    Implementation(name="engine-per_layer-quantile", clipping="per_layer", make=_engine("per_layer", bounds=STILL)),
    Implementation(
        name="opacus-hooks", clipping="flat", make=_opacus("OpacusStep"), needs="opacus", batched_positions=True
    ),
    Implementation(
        name="opacus-ghost", clipping="flat", make=_opacus("OpacusGhostStep"), needs="opacus", batched_positions=True
    ),
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in _ALL}
BASELINE = "compile"
