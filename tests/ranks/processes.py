"""Processes that are ranks of torch.distributed, for one function after another: starting them is what takes long."""

from __future__ import annotations

import datetime
import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.distributed as dist

WAIT = 40.0  # seconds that ranks wait for each other
LIMIT = 120.0  # and that a test waits for all of them
SHARED = ["torch._dynamo", "torch.distributed.fsdp", "ranks.sharded"]  # what they are forked with: what takes longest


class Failed(NamedTuple):
    """What a rank got instead of a result: the name of an exception's class, and its text."""

    kind: str
    text: str


class Pool:
    """Starts processes when they are needed first. `folder` is for the files in which they find each other."""

    def __init__(self, folder: str) -> None:
        self._folder, self._members, self._runs = folder, [], 0

    def run(self, size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
        """`function(rank, size, *args)` on so many ranks: what each of them returned."""
        found = self.outcomes(size, function, *args, backend=backend)
        for rank, one in enumerate(found):
            assert not isinstance(one, Failed), f"rank {rank} of {size}: {one.kind}: {one.text}"
        return found

    def outcomes(
        self, size: int, function: Callable[..., Any], *args: Any, wait: float = WAIT, backend: str = "gloo"
    ) -> list[Any]:
        """The same, with a `Failed` in the place of what a rank has raised. Ranks wait for each other no longer than
        `wait` seconds. What goes to them and comes back is pickled; the function by its file and name."""
        while len(self._members) < size:
            self._members.append(_started(len(self._members)))
        self._runs += 1
        place = os.path.join(self._folder, f"run{self._runs}")
        for rank, (_, pipe) in enumerate(self._members[:size]):
            call = (inspect.getfile(function), function.__qualname__, rank, size, place, wait, backend, args)
            pipe.send_bytes(pickle.dumps(call))
        end = time.monotonic() + wait + LIMIT
        try:
            return [self._answer(rank, end) for rank in range(size)]
        except BaseException:
            self.close()  # what the others are in the middle of would be in the way of the next test
            raise

    def _answer(self, rank: int, end: float) -> Any:
        process, pipe = self._members[rank]
        if not pipe.poll(max(end - time.monotonic(), 0)):
            raise AssertionError(f"rank {rank} has not answered in time")
        try:
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            process.join(5)
            raise AssertionError(f"the process of rank {rank} has died, exit code {process.exitcode}") from None

    def close(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.kill()
        for process, _ in self._members:
            process.join()
        self._members.clear()


def _started(rank: int) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")  # CUDA is not forked
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(SHARED)
    mine, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, rank), daemon=True)
    process.start()
    its.close()
    return process, mine


def _serve(pipe: Any, rank: int) -> None:
    torch.set_num_threads(1)
    if gpus := torch.cuda.device_count():  # NCCL lets ranks share a GPU if it takes them for those of several hosts
        os.environ["NCCL_HOSTID"] = f"host{rank // gpus}"
    gc.set_threshold(50_000)  # as tests/conftest.py
    while True:
        try:
            told = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer_to(*pickle.loads(told)))


def _answer_to(
    file: str, name: str, rank: int, size: int, place: str, wait: float, backend: str, args: tuple[Any, ...]
) -> bytes:
    split = torch._dynamo.config.optimize_ddp  # which an engine turns off for the process
    try:
        function = getattr(_module(file), name)
        timeout = datetime.timedelta(seconds=wait)
        dist.init_process_group(backend, init_method=f"file://{place}", rank=rank, world_size=size, timeout=timeout)
        torch.manual_seed(0)
        return pickle.dumps(function(rank, size, *args))
    except Exception as error:
        return pickle.dumps(Failed(type(error).__name__, str(error)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch._dynamo.config.optimize_ddp = split
        torch._dynamo.reset()
        gc.collect()  # an engine is in cycles, and holds its journal
        gc.freeze()  # what is left is torch's own: the next call has little to look at


def _module(file: str) -> Any:
    """A test module: pytest's way of importing it is not to be had here."""
    name = f"_ranks_{os.path.splitext(os.path.basename(file))[0]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def temporary() -> Any:
    return tempfile.TemporaryDirectory(prefix="flashdp_ranks_")
