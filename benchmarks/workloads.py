"""What is trained: a model, its shapes, and random batches. `WORKLOADS` lists them by name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import GPT, Llama, ViT

Batch = tuple[Tensor, Tensor]
MODELS: dict[str, Any] = {"gpt": GPT, "llama": Llama, "vit": ViT}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`size` are the arguments of the model's constructor; `length` counts the tokens of a sample."""

    name: str
    family: str
    batch: int
    length: int
    size: Mapping[str, Any]

    def model(self, *, batched_positions: bool = False, device: str = "cpu", seed: int = 0) -> nn.Module:
        """The same weights for the same seed and device. `batched_positions` matters to GPT alone."""
        torch.manual_seed(seed)
        size: dict[str, Any] = dict(self.size)
        if self.family == "gpt":
            size |= {"length": self.length, "batched_positions": batched_positions}
        with torch.device(device):
            return MODELS[self.family](**size)

    def shallow(self) -> "Workload":
        """The same with one block."""
        return replace(self, size={**self.size, "layers": 1})

    def batches(self, count: int, device: str, seed: int = 1) -> list[Batch]:
        """Random batches, drawn on the CPU, so that they are the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (self._batch(generator) for _ in range(count))
        return [(inputs.to(device), targets.to(device)) for inputs, targets in drawn]

    def shapes(self) -> dict[str, Any]:
        """What results record of this workload."""
        return {"model": self.family, "batch": self.batch, "length": self.length, **self.size}

    def _batch(self, generator: torch.Generator) -> Batch:
        if self.family == "vit":
            side = self.size["image"]
            images = torch.randn(self.batch, 3, side, side, generator=generator)
            return images, torch.randint(self.size["classes"], (self.batch,), generator=generator)
        tokens = torch.randint(self.size["vocabulary"], (self.batch, self.length + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _gpt(name: str, batch: int, length: int, *, layers: int, heads: int, width: int, vocabulary: int) -> Workload:
    size = {"layers": layers, "heads": heads, "width": width, "vocabulary": vocabulary}
    return Workload(name=name, family="gpt", batch=batch, length=length, size=size)


def _llama(name: str, batch: int, length: int, **size: Any) -> Workload:
    return Workload(name=name, family="llama", batch=batch, length=length, size=size)


def _long(batch: int, length: int, tied: bool) -> Workload:
    """Llama 3.2 1B, its blocks checkpointed."""
    name = f"llama-3.2-1b-{length // 1024}k{'-tied' if tied else ''}{'-single' if batch == 1 else ''}"
    return _llama(name, batch, length, **_LLAMA_3, vocabulary=128256, tied=tied)


def _vit(name: str, batch: int, **size: int) -> Workload:
    return Workload(name=name, family="vit", batch=batch, length=(size["image"] // size["patch"]) ** 2 + 1, size=size)


_SMALL = {"layers": 12, "heads": 12, "width": 768}
_LARGE = {"layers": 36, "heads": 20, "width": 1280}
_BILLION = {"layers": 16, "heads": 32, "width": 2048, "vocabulary": 32000}
_LLAMA_3 = {"layers": 16, "heads": 32, "groups": 8, "width": 2048, "mlp": 8192, "checkpoint": True}
_LENGTHS = {4096: 8, 8192: 4, 16384: 2, 32768: 2}  # tokens: samples
_LONGER = (65536, 98304, 131072)  # tokens of a single sample, to find out what fits
_TINY = {"layers": 1, "heads": 2, "width": 32}

_ALL = (
    _gpt("gpt2", 16, 1024, **_SMALL, vocabulary=50257),
    _gpt("gpt2-padded", 16, 1024, **_SMALL, vocabulary=50304),
    _gpt("gpt2-short", 64, 256, **_SMALL, vocabulary=50257),
    _gpt("gpt2-large", 8, 1024, **_LARGE, vocabulary=50257),
    _llama("llama-1b", 4, 1024, **_BILLION, mlp=5632),
    _llama("llama-1b-wide", 4, 1024, **_BILLION, mlp=8192),
    _llama("llama-1b-long", 2, 4096, **_BILLION, mlp=5632),
    *(_long(batch, length, tied) for tied in (False, True) for length, batch in _LENGTHS.items()),
    *(_long(1, length, tied) for tied in (False, True) for length in (*_LENGTHS, *_LONGER)),
    _vit("vit-b16", 64, **_SMALL, image=224, patch=16, classes=1000),
    # for tests on a CPU
    _gpt("tiny-gpt", 4, 16, **_TINY, vocabulary=61),
    _llama("tiny-llama", 4, 16, **_TINY, mlp=48, vocabulary=61),
    _llama("tiny-llama-tied", 4, 16, **_TINY, mlp=48, vocabulary=61, groups=1, tied=True, checkpoint=True),
    _vit("tiny-vit", 4, **_TINY, image=16, patch=8, classes=7),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
