"""Differentially private training as a torch.compile backend: torch.compile(model, backend="flashdp").

Names are loaded when they are first used, so that importing an error or a kernel does not import the compiler.
"""

from __future__ import annotations

import importlib
from typing import Any

from flashdp_compile._version import __version__

_PUBLIC = {
    "backend": "flashdp_compile.dynamo_backend",
    "explain": "flashdp_compile.explanation",
    "Options": "flashdp_compile.options",
    "Quantile": "flashdp_compile.engine.bound_rules",
    "nonfinite_samples": "flashdp_compile.runtime.clipping",
    "sequence_losses": "flashdp_compile.losses",
    "PrivacyEngine": "flashdp_compile.engine.privacy_engine",
    "BudgetExhaustedError": "flashdp_compile.errors",
    "FlashDPError": "flashdp_compile.errors",
    "InputError": "flashdp_compile.errors",
    "InternalError": "flashdp_compile.errors",
    "OptionError": "flashdp_compile.errors",
    "RanksError": "flashdp_compile.errors",
    "Refusal": "flashdp_compile.errors",
    "UnprotectedGradientError": "flashdp_compile.errors",
}
_MODULES = ("accounting", "audit", "data")
__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"flashdp_compile.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flashdp_compile' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
