"""What all implementations of one run have in common."""

import argparse
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """bf16 is autocast with float32 weights. `compiler` "eager" interprets graphs instead of compiling them, which
    says nothing about speed: for tests. `pool` is the number of batches that the steps take in turn."""

    device: str
    dtype: str
    compiler: str = "inductor"
    steps: int = 20
    warmup: int = 5
    pool: int = 4
    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    learning_rate: float = 1e-5

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16")

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def tolerance(self) -> float:
        """The largest error of a gradient that the check lets pass."""
        return 2e-2 if self.dtype == "bf16" else 1e-4

    def record(self) -> dict[str, Any]:
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options from which `from_arguments` makes settings."""
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="bf16 autocast by default, fp32 on a CPU")
    parser.add_argument("--compiler", choices=["inductor", "eager"], default="inductor")


def from_arguments(arguments: argparse.Namespace) -> Settings:
    dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    return Settings(
        device=arguments.device,
        dtype=dtype,
        compiler=arguments.compiler,
        steps=arguments.steps,
        warmup=arguments.warmup,
    )
