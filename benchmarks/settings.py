"""What all implementations of one run have in common."""

import argparse
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """bf16 is autocast with float32 weights. `compiler` "eager" interprets graphs instead of compiling them, which
    says nothing about speed: for tests. `pool` is the number of batches that the steps take in turn.

    `shallow`: gradients are checked on a model of one block with the same shapes, for models that the reference would
    take longer for than all else. `memory_gb`: how much of the device a process may use, as on a smaller one.
    """

    device: str
    dtype: str
    compiler: str = "inductor"
    steps: int = 20
    warmup: int = 5
    pool: int = 4
    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    learning_rate: float = 1e-5
    shallow: bool = False
    memory_gb: float | None = None

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16")

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def limit_memory(self) -> None:
        if self.memory_gb is not None and self.device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.memory_gb * 1e9 / total))

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
    parser.add_argument("--shallow", action="store_true", help="check gradients on a model of one block")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="what a process may use of the device")


def from_arguments(arguments: argparse.Namespace) -> Settings:
    dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    return Settings(
        device=arguments.device,
        dtype=dtype,
        compiler=arguments.compiler,
        steps=arguments.steps,
        warmup=arguments.warmup,
        shallow=arguments.shallow,
        memory_gb=arguments.memory_gb,
    )
