"""One implementation on one workload, in this process: check, then time."""

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from math import isfinite
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.check import CheckFailed, check, combination, expected_gradients
from benchmarks.environment import environment
from benchmarks.implementations import IMPLEMENTATIONS, Implementation
from benchmarks.profile import profile
from benchmarks.rounds import ALONE, Place, patiently
from benchmarks.settings import Settings
from benchmarks.steps import Observed, Step, run_steps
from benchmarks.workloads import WORKLOADS, Batch, Workload
from flashdp_compile.compat import compile_clocks

HOST_STEPS = 7
LEFT = 128 * 2**20  # bytes that a check may leave on the device: half of them are the table that noise is read from
NOTED_S = 0.02  # shorter phases of a compilation are not named


class Prepared(NamedTuple):
    """A step that has compiled and passed its check."""

    step: Step
    batches: list[Batch]
    first_step_s: float | None
    error: float
    worst: str  # the parameter that has this error


def prepare(workload: str, implementation: str, settings: Settings, place: Place = ALONE) -> Prepared:
    """Builds the model, runs the first step, and compares gradients with the reference: those of the step itself, or
    with `settings.shallow` those of the same step on a model of one block.

    Raises:
        CheckFailed: the gradients are wrong.
    """
    its, maker = WORKLOADS[workload], IMPLEMENTATIONS[implementation]
    if not settings.shallow:
        return _checked(its, maker, settings, place)
    error, worst = _checked(its.shallow(), maker, settings, place)[-2:]
    torch.compiler.reset()
    _release(settings)
    if settings.device == "cuda" and (left := torch.cuda.memory_allocated()) > LEFT:
        raise RuntimeError(f"{left} bytes of the model of one block are still there, and would count as the step's")
    model, batches = inputs(its, maker, settings)
    step = maker.make(model, its.batch, settings)
    seconds = _first(step, batches[0], settings, place)
    _check_sanity(patiently(lambda: step.observe(batches[0]), place))
    return Prepared(step, batches, seconds, error, worst)


def _check_sanity(observed: Observed) -> None:
    """What can be told without a reference: each gradient is there. `observe` has looked at the noise.

    Raises:
        CheckFailed: a gradient is zero, or not finite.
    """
    for name, gradient in observed.gradients.items():
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        if not isfinite(norm) or not norm > observed.rounding[name]:
            raise CheckFailed(f"the gradient of {name} has the norm {norm:.3g}")


def inputs(its: Workload, maker: Implementation, settings: Settings) -> tuple[nn.Module, list[Batch]]:
    """The model and batches that this implementation is run on."""
    model = its.model(batched_positions=maker.batched_positions, device=settings.device)
    return model, its.batches(settings.pool, settings.device)


def _checked(its: Workload, maker: Implementation, settings: Settings, place: Place) -> Prepared:
    model, batches = inputs(its, maker, settings)
    reference = partial(expected_gradients, model, batches[0], maker.clipping, settings.max_grad_norm)
    with place.alone():
        expected = patiently(reference, place)
        plain = patiently(lambda: reference(settings.autocast), place) if settings.dtype == "bf16" else None
    step = maker.make(model, its.batch, settings)
    seconds = _first(step, batches[0], settings, place)
    observed = patiently(lambda: step.observe(batches[0]), place)
    error = check(observed.gradients, expected, observed.rounding, max(settings.tolerance, maker.leeway), plain)
    if maker.probes is not None:
        nearest = partial(combination, model, batches[0], maker.clipping)
        with place.alone():
            patiently(lambda: _check_directions(observed, nearest, plain, settings), place)
    return Prepared(step, batches, seconds, *error)


def _check_directions(
    observed: Observed,
    nearest: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    plain: Mapping[str, Tensor] | None,
    settings: Settings,
) -> None:
    """Estimated norms may change how much a sample weighs, and nothing else: what is left of the gradients besides a
    sum of those of the samples is rounding."""
    found = nearest(observed.gradients)
    rounded = None
    if plain is not None:
        own = nearest(plain)
        rounded = {name: found[name] + (p - own[name]) for name, p in plain.items()}
    check(observed.gradients, found, observed.rounding, settings.tolerance, rounded)


def _first(step: Step, batch: Batch, settings: Settings, place: Place) -> float | None:
    """Seconds of the first forward and backward; None if memory had to be waited for."""
    tries = 0

    def seconds() -> float:
        nonlocal tries
        tries += 1
        return _seconds(lambda: step.backward(batch), settings)

    found = patiently(seconds, place)
    return found if tries == 1 else None


def _release(settings: Settings) -> None:
    """Gives memory back that is not in use."""
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()


def measure(
    workload: str, implementation: str, settings: dict[str, Any], place: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Times of `steps` steps after `warmup` others, the peak of allocated memory during them, and what ran in a few
    more. `place`: that in a round, whose others are not timed meanwhile."""
    own, here = Settings(**settings), Place(**(place or {}))
    own.limit_memory()
    prepared = prepare(workload, implementation, own, here)
    prepared.step.optimizer.zero_grad(set_to_none=True)
    _release(own)  # before the warm-up, which allocates again
    with here.turn():
        found = _timed(prepared.step, prepared.batches, own)
    return {
        "environment": environment(own.device),
        "compile_s": None if prepared.first_step_s is None else round(prepared.first_step_s, 2),
        "error": prepared.error,
        "worst": prepared.worst,
        **found,
    }


def _timed(step: Step, batches: list[Batch], own: Settings) -> dict[str, Any]:
    run_steps(step, batches, own.warmup)
    own.synchronise()
    if own.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_ms, loss = timed_steps(step, batches, own)
    if not bool(loss.isfinite()):
        raise CheckFailed("the loss is not finite after the timed steps")
    peak = torch.cuda.max_memory_allocated() if own.device == "cuda" else None
    host_ms = launched_ms(step, batches, own) if own.device == "cuda" else None
    profiled = profile(step, batches, own, median(step_ms))
    if complaint := step.complaint():
        raise CheckFailed(complaint)
    return {
        "step_ms": [round(ms, 4) for ms in step_ms],
        "median_ms": round(median(step_ms), 4),
        "host_ms": host_ms,
        "peak_bytes": peak,
        **profiled,
    }


def first_step(workload: str, implementation: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first forward and backward alone: a start with warm caches, if an earlier process filled them.

    `caches` and `phases` tell what they were spent on.
    """
    own = Settings(**settings)
    its, maker = WORKLOADS[workload], IMPLEMENTATIONS[implementation]
    model, (batch, *_) = inputs(its, maker, own)
    # like the check of a full run, this starts the device's libraries, which is no part of compiling
    expected_gradients(model, (batch[0][:1], batch[1][:1]), maker.clipping, own.max_grad_norm, own.autocast)
    step = maker.make(model, its.batch, own)
    seconds = _seconds(lambda: step.backward(batch), own)
    clocks = compile_clocks()
    phases = {name: round(s, 2) for name, s in clocks["phases"].items() if s >= NOTED_S}
    return {"seconds": round(seconds, 2), "caches": clocks["caches"], "phases": phases}


def timed_steps(step: Step, batches: list[Batch], settings: Settings) -> tuple[list[float], Tensor]:
    """Milliseconds of each step, end to end: nothing that happens between two steps is left out."""
    marks: list[Any] = [_mark(settings)]
    for i in range(settings.steps):
        loss = step(batches[i % len(batches)])
        marks.append(_mark(settings))
    settings.synchronise()
    if settings.device == "cuda":
        return [start.elapsed_time(end) for start, end in pairwise(marks)], loss
    return [1000 * (end - start) for start, end in pairwise(marks)], loss


def launched_ms(step: Step, batches: list[Batch], settings: Settings) -> float:
    """Milliseconds that the host takes to launch a step, with nothing before it that it could wait for."""
    seconds = []
    for i in range(HOST_STEPS):
        settings.synchronise()
        start = time.perf_counter()
        step(batches[i % len(batches)])
        seconds.append(time.perf_counter() - start)
    return round(1000 * median(seconds), 4)


def _mark(settings: Settings) -> Any:
    """A moment: a CUDA event on the stream, or the time of day."""
    if settings.device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(call: Callable[[], object], settings: Settings) -> float:
    settings.synchronise()
    start = time.perf_counter()
    call()
    settings.synchronise()
    return time.perf_counter() - start
