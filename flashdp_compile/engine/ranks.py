"""The processes that train one model together: what they tell each other so that every step is the same on all of them.

What the host says (that a step is due, that something is wrong) goes over a group of its own, so that nobody waits for
a GPU. Every rank takes part in every exchange, one that has failed too: then all of them raise, and none is left
waiting for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashdp_compile.compat import adding_up, wait_of
from flashdp_compile.errors import InternalError, RanksError

_SAID, _FAILED = 0, 1
_NOTHING_RELEASED = "Nothing was released"
_COUNTED = "The step is counted, and other ranks may have taken it: begin anew from a checkpoint"
WAVE = 1 << 28  # bytes: a millisecond or more between GPUs, and few enough for noise to begin early


class Ranks:
    """All processes of torch.distributed's default group, or this one alone.

    Methods are called by all of them, in the same order. Alone they find nothing to compare or to wait for.
    """

    def __init__(self) -> None:
        self.size = _world()
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._error_all_know: BaseException | None = None
        self._failed_behind: str | None = None
        self._host: Any = None
        if self.size > 1:
            with self._answers():
                self._host = _host_group()

    @property
    def group(self) -> bool:
        """Whether there is one now, be it of a single rank: then the model may be put into DistributedDataParallel."""
        return dist.is_available() and dist.is_initialized()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check_world(self) -> None:
        """Raises RanksError if the ranks are not those of the beginning: each would train for itself, and spend."""
        if (now := _world()) != self.size:
            raise self._raised(
                f"the engine was made in a group of {self.size}, and now torch.distributed has a group of {now}: make "
                "the engine behind init_process_group"
            )

    def agree(self, what: str, told: Any) -> None:
        """Returns once all ranks have said the same of `what`.

        Raises RanksError on each of them if they differ, or if one of them has failed `together` instead.
        """
        if self.size > 1:
            self._exchange(_SAID, what, told)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails within fails on all ranks, at the next `agree` of the others."""
        self.check_world()
        try:
            if self._failed_behind is not None:
                raise RanksError(
                    f"a step was counted on all ranks, and failed behind that on rank {self.rank} "
                    f"({self._failed_behind}): others may have taken it, and parameters differ then. Begin anew from a "
                    "checkpoint"
                )
            yield
        except Exception as error:
            if self.size > 1 and error is not self._error_all_know:  # what came from an exchange is known already
                with contextlib.suppress(RanksError):
                    self._exchange(_FAILED, f"{type(error).__name__}: {error}", "")
                self._error_all_know = error
            raise

    @contextlib.contextmanager
    def behind_agreement(self) -> Iterator[None]:
        """What fails within may fail on this rank alone, behind a step that all have counted: others may have taken it.
        So this one, and by its next answer all of them, take no further step."""
        try:
            yield
        except BaseException as error:
            if self.size > 1:
                self._failed_behind = f"{type(error).__name__}: {error}"
            raise

    def secret(self, count: int) -> bytes:
        """Bytes of the first rank's operating system. Only behind an `agree`, as nobody may be missing."""
        if self.size == 1:
            return os.urandom(count)
        drawn = torch.tensor(list(os.urandom(count)), dtype=torch.uint8)
        return bytes(self._of_first(drawn).tolist())

    def number(self, own: int) -> int:
        """That of the first rank, as `secret`."""
        return own if self.size == 1 else int(self._of_first(torch.tensor(own, dtype=torch.int64)))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each by its sum over all ranks."""
        for _ in self.adding_up(tensors):
            pass

    def adding_up(self, tensors: Sequence[Tensor]) -> Iterator[list[int]]:
        """Replaces each by its sum over all ranks. Gives the places of those that have come, while others are on their
        way: what is done with these on a GPU does not wait for those."""
        if self.size == 1:
            yield list(range(len(tensors)))
            return
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise InternalError("ranks add up memory, in which tensors that are not contiguous may lie in other orders")
        waves, pending = _waves(tensors), []
        with self._answers(_COUNTED):
            for wave in waves:
                group = None if tensors[wave[0]].is_cuda else self._host
                pending.append(adding_up([tensors[at] for at in wave], group))
        for wave, wait in zip(waves, pending, strict=True):
            with self._answers(_COUNTED):
                wait()
            yield wave

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises RanksError unless tensors of one name hold the same on all ranks that have it, as told by two sums.
        Waits for their devices."""
        if self.size == 1:
            return
        sums = dict(zip(tensors, (pair.numpy().tobytes() for pair in _sums(tensors.values())), strict=True))
        first: dict[str, int] = {}
        for rank, its in enumerate(found := self._from_all("values to compare", sums)):
            for name, own in its.items():
                if own != found[other := first.setdefault(name, rank)][name]:
                    raise self._raised(
                        f"ranks {other} and {rank} do not agree: other values of {name}. All of them begin with the "
                        "same weights: wrap the model into DistributedDataParallel, which makes them equal, or load "
                        "the same on all ranks"
                    )

    def check_other_samples(self, numbers: Sequence[Any]) -> None:
        """Raises RanksError if two ranks were given the same samples, by which these `numbers` were made; one without
        any is given others."""
        if self.size == 1:
            return
        for rank, its in enumerate(found := self._from_all("samples to compare", numbers)):
            if its and (other := found.index(its)) != rank:
                raise self._raised(
                    f"ranks {other} and {rank} were given the same samples: each adds to the step as often as there "
                    "are ranks that have it, and is accounted for once. With sampling=, give each rank samples of its "
                    "own, as torch.utils.data.DistributedSampler does; or iterate engine.data_loader(...)"
                )

    def _from_all(self, what: str, own: Any) -> list[Any]:
        """What each rank has, once all are here, and nothing can fail on one of them before it has told."""
        self.agree("a first step", what)
        return self._gathered(own)

    def _gathered(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._answers():
            dist.all_gather_object(found, own, group=self._host)
        return found

    def _of_first(self, value: Tensor) -> Tensor:
        with self._answers():
            dist.broadcast(value, 0, group=self._host)
        return value

    def _exchange(self, status: int, what: str, told: Any) -> None:
        digest = int.from_bytes(hashlib.sha256(f"{what}: {told!r}".encode()).digest()[:8], "little", signed=True)
        mine = torch.tensor([status, digest])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._answers():
            dist.all_gather(found, mine, group=self._host)
            states = [tuple(one.tolist()) for one in found]
        if len(set(states)) == 1 and status == _SAID:
            return
        all_told = self._gathered((status, what, told))
        if status == _FAILED:
            return  # the others are told, and this one raises what it has
        raise self._raised(_difference(all_told))

    @contextlib.contextmanager
    def _answers(self, so: str = _NOTHING_RELEASED) -> Iterator[None]:
        """Within, this rank waits for others. `so`: what has become of the step if they do not answer."""
        try:
            yield
        except RuntimeError as error:
            raise self._raised(
                f"rank {self.rank} has waited in vain for the others ({error}). One of them has ended, or is busy with "
                "something else: every rank makes the same engine, takes the same steps, and skips no batch",
                so,
            ) from error

    def _raised(self, text: str, so: str = _NOTHING_RELEASED) -> RanksError:
        self._error_all_know = error = RanksError(text if so in text else f"{text}. {so}")
        return error


def _waves(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors that are added up in one operation: of one device and dtype, WAVE bytes of them or more."""
    found, open_waves = list[list[int]](), dict[tuple[torch.device, torch.dtype], tuple[list[int], int]]()
    for at, tensor in enumerate(tensors):
        kind = tensor.device, tensor.dtype
        wave, size = open_waves.get(kind, ([], WAVE))
        if size >= WAVE:
            wave, size = [], 0
            found.append(wave)
        wave.append(at)
        open_waves[kind] = wave, size + tensor.nbytes
    return found


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def _sums(tensors: Iterable[Tensor]) -> Tensor:
    """[tensors, 2] on the CPU: of the elements of each, and of their squares."""
    sums = [torch.stack([t.double().sum(), t.double().square().sum()]) for t in tensors]
    return torch.stack([pair.cpu() for pair in sums])


def _difference(all_told: Sequence[tuple[int, str, Any]]) -> str:
    failed = [f"rank {rank} has failed: {what}" for rank, (status, what, _) in enumerate(all_told) if status == _FAILED]
    if failed:
        return "; ".join(failed)
    said: dict[str, list[int]] = {}
    tolds = [told for _, _, told in all_told]
    for rank, (_, what, told) in enumerate(all_told):
        said.setdefault(f"{what}: {_what_differs(told, tolds)}", []).append(rank)
    parts = (f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {t}" for t, ranks in said.items())
    return "ranks do not agree. " + "; ".join(parts)


def _what_differs(told: Any, tolds: Sequence[Any]) -> str:
    """What was told, of a mapping only what others have told otherwise."""
    if not all(isinstance(other, Mapping) for other in tolds):
        return str(told)
    names = [name for name in told if len({repr(other.get(name)) for other in tolds}) > 1]
    return ", ".join(f"{name}={told[name]!r}" for name in names)


_groups: dict[Any, Any] = {}


def _host_group() -> Any:
    """A group of all ranks for tensors on the CPU, where nothing but this is said: gloo pairs what comes by its order,
    so one rank's agreement would meet another's sum of its own over the default group."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()  # of a world that is gone
        device = "cpu" if "cpu:" in dist.get_backend_config(world) else "cuda"
        _groups[world] = dist.new_group(backend="gloo", timeout=wait_of(torch.device(device)))
    return _groups[world]
