"""Training steps on the GPUs of one machine, private and plain: spread by fully_shard, or a replica on each.

    python -m benchmarks.sharded --models llama-7b --lengths 2048 4096 --ranks 4 --out results.json

The same script with another word. Spread models are compiled block by block, and each keeps its input alone for the
backward; all implementations of a workload run in the same processes, one after the other. Replicas ("ddp-") have
processes of their own, and are compiled as a whole, the plain one cut at the sizes of buckets, as torch does unless it
is told otherwise ("ddp-compile-whole"). Float32 parameters and bfloat16 compute. A few steps behind the timed ones are
profiled, on the first rank. What is right is for the tests (tests/ranks) to say; here a step must be finite.

With --alone a single GPU runs the first of so many ranks: for the parameters that others would send it takes copies of
its own, and it sends nothing. So it computes, copies and holds what it would among them, and waits for nobody.
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
import torch._dynamo
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, multiprocessing, nn

from benchmarks import profile
from benchmarks.environment import environment
from benchmarks.parts import SIZES, replica, sharded
from benchmarks.results import REPLICAS, Results, Run
from benchmarks.tables import terminal
from flashdp_compile import PrivacyEngine, accounting
from flashdp_compile.engine import ranks as engine_ranks
from flashdp_compile.engine.sharded import compiled_calls, parts_of

SHARDED = ("compile", "flashdp-per_block", "flashdp-per_layer", "flashdp-flat")
REPLICATED = ("ddp-compile", "ddp-compile-whole", "ddp-flashdp-flat", "ddp-flashdp-per_layer")
NOISE = 1.0
KERNELS = 40  # that are named one by one


def step_of(implementation: str, model: nn.Module, batch: int, compiler: str) -> tuple[nn.Module, Any]:
    """The compiled model and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=next(model.parameters()).is_cuda or None)
    backend = "inductor" if compiler == "inductor" else "aot_eager"
    name = implementation.removeprefix(REPLICAS)
    if name.startswith("compile"):
        if implementation in REPLICATED:
            return torch.compile(model, backend=backend, dynamic=False), optimizer  # type: ignore[return-value]
        parts = parts_of(model).values()
        calls = compiled_calls(parts, backend=backend, fullgraph=True, dynamic=False)
        for part in parts:
            part.forward = partial(calls[part], part)
        return model, optimizer
    engine = PrivacyEngine(
        target_delta=1e-6,
        expected_batch_size=batch,
        noise_multiplier=NOISE,
        steps=10**4,
        clipping=name.removeprefix("flashdp-"),
        sampling=accounting.Fixed(10**4),
        options={"compiler": compiler},
    )
    model.engine = engine  # type: ignore[assignment]
    return engine.compile(model, dynamic=False), engine.attach(optimizer)


def measured(implementation: str, size: dict[str, int], own: argparse.Namespace, length: int) -> dict[str, Any]:
    """Milliseconds of each step, the peak of memory, and on the first rank a profile."""
    device = torch.device(own.device, dist.get_rank()) if own.device == "cuda" else torch.device("cpu")
    if implementation in REPLICATED:
        model = replica(size, device)
    else:
        model = sharded(size, device, torch.bfloat16 if own.gathered == "bf16" else None)
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
    found = {"step_ms": times, "median_ms": median(times), "peak_bytes": peak, "compile_s": compile_s}
    return found | _profiled(step, found["median_ms"], device)


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


def _profiled(step: Callable[[], Tensor], median_ms: float, device: torch.device) -> dict[str, Any]:
    """All ranks take the steps, of which the first sees its own."""

    def run() -> None:
        for _ in range(profile.PROFILED):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    if dist.get_rank() > 0:
        run()
        return {}
    return profile.summary(profile.record(run, device.type), median_ms, KERNELS)


def work(rank: int, ranks: int, store: str, own: argparse.Namespace) -> None:
    if own.device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if own.alone:
        _pretend(ranks)
    else:
        backend = "cpu:gloo,cuda:nccl" if own.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    results = Results(environment=environment(own.device), settings=_settings(own))
    if own.out.exists():
        results.runs = Results.load(own.out).runs
    for name in own.models:
        for length in own.lengths:
            for implementation in own.implementations:
                spread = f"1 of {ranks}" if own.alone else ranks
                workload = f"{name}, {spread} x {own.batch} x {length}" + (", bf16" if own.gathered == "bf16" else "")
                shapes = {"model": name, "ranks": ranks, "batch": own.batch, "length": length}
                found = _outcome(implementation, name, own, length)
                run = Run(workload=workload, implementation=implementation, shapes=shapes, **found)
                results.runs.append(run)
                if rank == 0:
                    results.save(own.out)
                    told = (workload, implementation, run.status, run.reason, run.median_ms, _left(own.device))
                    print(*told, flush=True)
    if rank == 0:
        Console(width=180).print(terminal(results))
    dist.destroy_process_group()


def _pretend(ranks: int) -> None:
    """Makes this process the first of so many that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    engine_ranks._host_group = lambda: dist.group.WORLD  # noqa: SLF001  which is gloo's, and would wait
    # each of them would have samples of its own, and is heard to have those of this one
    engine_ranks.Ranks.check_other_samples = lambda self, numbers: None  # type: ignore[method-assign]


def _outcome(implementation: str, name: str, own: argparse.Namespace, length: int) -> dict[str, Any]:
    cut = implementation != "ddp-compile-whole"
    try:
        with torch._dynamo.config.patch(optimize_ddp=cut):  # noqa: SLF001  which an engine turns off for the process
            found = measured(implementation, SIZES[name], own, length)
    except torch.OutOfMemoryError as error:
        return {"status": "failed", "reason": str(error).splitlines()[0]}
    finally:
        torch.compiler.reset()
        gc.collect()
        if own.device == "cuda":
            torch.cuda.empty_cache()
    return {"status": "ok", **found}


def _left(device: str) -> str:
    """What is left of a run, which would count as memory of the next."""
    return f"{torch.cuda.memory_allocated() / 2**30:.2f} GiB left" if device == "cuda" else ""


def _settings(own: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": "bf16", "steps": own.steps, "warmup": own.warmup, "noise_multiplier": NOISE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, choices=SIZES, metavar="NAME")
    parser.add_argument(
        "--implementations", nargs="+", default=SHARDED, choices=[*SHARDED, *REPLICATED], metavar="NAME"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048], help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples of a rank")
    parser.add_argument("--ranks", nargs="+", type=int, default=[torch.cuda.device_count() or 2])
    parser.add_argument(
        "--gathered", choices=["f32", "bf16"], default="f32", help="sharded parameters while they are computed with"
    )
    parser.add_argument("--alone", action="store_true", help="one GPU, as the first of so many ranks")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    own = parser.parse_args()
    together = [name for name in own.implementations if name not in REPLICATED]
    alone = [[name] for name in own.implementations if name in REPLICATED]  # torch keeps a replica's buckets
    for ranks in own.ranks:
        for names in filter(None, [together, *alone]):
            with tempfile.TemporaryDirectory() as folder:
                told = argparse.Namespace(**{**vars(own), "implementations": names})
                multiprocessing.spawn(work, (ranks, f"{folder}/store", told), nprocs=1 if own.alone else ranks)


if __name__ == "__main__":
    main()
