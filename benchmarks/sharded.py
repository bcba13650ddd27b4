"""Training steps of models that fully_shard has spread over the GPUs of one machine, private and plain.

    python -m benchmarks.sharded --models llama-7b --lengths 2048 4096 --ranks 4 --out results.json

All implementations of a workload run in the same processes, one after the other: the same script with another word.
Each block is compiled by itself and keeps its input alone for the backward, in float32 parameters and bfloat16 compute.
What is right is for the tests (tests/ranks) to say; here a step must be finite, and noise must be in it.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from benchmarks.environment import environment
from benchmarks.models import LlamaBlock, token_losses
from benchmarks.results import Results, Run
from benchmarks.tables import terminal
from flashdp_compile import PrivacyEngine, accounting
from flashdp_compile.engine.sharded import compiled_calls, parts_of

SIZES: dict[str, dict[str, int]] = {
    "llama-1b": {"layers": 16, "heads": 32, "width": 2048, "mlp": 8192, "groups": 8, "vocabulary": 128256},
    "llama-7b": {"layers": 32, "heads": 32, "width": 4096, "mlp": 11008, "groups": 32, "vocabulary": 32000},
    "llama-13b": {"layers": 40, "heads": 40, "width": 5120, "mlp": 13824, "groups": 40, "vocabulary": 32000},
    "tiny": {"layers": 2, "heads": 2, "width": 32, "mlp": 48, "groups": 2, "vocabulary": 61},
}
IMPLEMENTATIONS = ("compile", "flashdp-per_block", "flashdp-per_layer")
NOISE = 1.0


class Checkpointed(nn.Module):
    """Keeps its input alone for the backward; inside of what is compiled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Head(nn.Module):
    """The last norm, the logits and the losses [B]: all that is large in one graph."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.logits = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return token_losses(self.logits(self.norm(x)), targets)


class Llama(nn.Module):
    def __init__(self, *, layers: int, heads: int, width: int, mlp: int, groups: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Checkpointed(LlamaBlock(width, heads, mlp, groups)) for _ in range(layers))
        self.head = Head(width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)


def sharded(size: dict[str, int], device: torch.device) -> nn.Module:
    """The model, each block, embedding and head sharded by itself; weights are made where they belong."""
    with torch.device("meta"):
        model = Llama(**size)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.tokens, *model.blocks, model.head):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter._local_tensor  # noqa: SLF001
            local.fill_(1.0) if "norm" in name else local.normal_(std=0.02)
    return model


def step_of(implementation: str, model: nn.Module, batch: int, compiler: str) -> tuple[nn.Module, Any]:
    """The compiled model and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=next(model.parameters()).is_cuda or None)
    if implementation == "compile":
        backend = "inductor" if compiler == "inductor" else "aot_eager"
        parts = parts_of(model).values()
        calls = compiled_calls(parts, backend=backend, fullgraph=True, dynamic=False)
        for part in parts:
            part.forward = partial(calls[type(part)], part)
        return model, optimizer
    engine = PrivacyEngine(
        target_delta=1e-6,
        expected_batch_size=batch,
        noise_multiplier=NOISE,
        steps=10**4,
        clipping=implementation.removeprefix("flashdp-"),
        sampling=accounting.Fixed(10**4),
        options={"compiler": compiler},
    )
    model.engine = engine  # type: ignore[assignment]
    return engine.compile(model, dynamic=False), engine.attach(optimizer)


def measured(implementation: str, size: dict[str, int], own: argparse.Namespace, length: int) -> dict[str, Any]:
    """Milliseconds of each step, and the peak of memory, on this rank."""
    device = torch.device(own.device, dist.get_rank()) if own.device == "cuda" else torch.device("cpu")
    model = sharded(size, device)
    compiled, optimizer = step_of(implementation, model, own.batch * dist.get_world_size(), own.compiler)
    generator = torch.Generator().manual_seed(dist.get_rank())
    data = torch.randint(size["vocabulary"], (own.batch, length + 1), generator=generator).to(device)
    tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(own.device, torch.bfloat16):
            losses = compiled(tokens, targets)
        losses.mean().backward()
        optimizer.step()
        return losses.detach().mean()

    start = time.perf_counter()
    step()
    compile_s = time.perf_counter() - start
    for _ in range(own.warmup):
        loss = step()
    times, peak = _timed(step, own.steps, device)
    if not bool(loss.isfinite()):
        raise RuntimeError("the loss is not finite")
    return {"step_ms": times, "peak_bytes": peak, "compile_s": compile_s}


def _timed(step: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[list[float], int | None]:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return [1000 * (time.perf_counter() - start) / steps], None
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return times, torch.cuda.max_memory_allocated()


def work(rank: int, ranks: int, store: str, own: argparse.Namespace) -> None:
    if own.device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own.device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
    )
    results = Results(environment=environment(own.device), settings=_settings(own))
    if own.out.exists():
        results.runs = Results.load(own.out).runs
    for name in own.models:
        for length in own.lengths:
            for implementation in own.implementations:
                workload = f"{name}, {ranks} x {own.batch} x {length}"
                run = Run(
                    workload=workload, implementation=implementation, **_outcome(implementation, name, own, length)
                )
                results.runs.append(run)
                if rank == 0:
                    results.save(own.out)
                    print(workload, implementation, run.status, run.reason, run.median_ms, flush=True)
    if rank == 0:
        Console(width=180).print(terminal(results))
    dist.destroy_process_group()


def _outcome(implementation: str, name: str, own: argparse.Namespace, length: int) -> dict[str, Any]:
    try:
        found = measured(implementation, SIZES[name], own, length)
    except torch.OutOfMemoryError as error:
        return {"status": "failed", "reason": str(error).splitlines()[0]}
    finally:
        torch.compiler.reset()
        gc.collect()
        if own.device == "cuda":
            torch.cuda.empty_cache()
    return {"status": "ok", "median_ms": median(found["step_ms"]), **found}


def _settings(own: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": "bf16", "steps": own.steps, "warmup": own.warmup, "noise_multiplier": NOISE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, choices=SIZES, metavar="NAME")
    parser.add_argument(
        "--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS, metavar="NAME"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048], help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples of a rank")
    parser.add_argument("--ranks", nargs="+", type=int, default=[torch.cuda.device_count() or 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    own = parser.parse_args()
    for ranks in own.ranks:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(work, (ranks, f"{folder}/store", own), nprocs=ranks)


if __name__ == "__main__":
    main()
