"""A release: one run of one compiled backward, whose parameter gradients leave it clipped and noised.

Each release spends privacy once, with its own sample clipping, its own noise and its own division by the expected
batch size. The accountant counts steps, so an optimizer step must consist of exactly one release. Under an engine a run
of a backward owes its noise: the sum over all micro-batches of a logical batch is what becomes a release, at the step.
"""

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from flashdp_compile.compat import backward_number
from flashdp_compile.runtime.bounds import Moved
from flashdp_compile.runtime.from_engine import FromEngine


@dataclass(frozen=True)
class Owed:
    """The noise that clipped sums lack: sigma `sensitivity` / `divisor` is its standard deviation. `sensitivity` bounds
    what one sample adds to the undivided sums of all parameters together. `reused`: the memory of gradients is used
    again by the next backward, as CUDA graphs do."""

    sensitivity: float
    divisor: float
    reused: bool = False
    from_engine: FromEngine = FromEngine()


@dataclass(frozen=True, kw_only=True)
class ReleaseInfo:
    """What the messages say about a compiled graph.

    `label` names it in the user's terms, for example "GPT.forward (model.py:41)". `graph_break` says why dynamo ended
    the graph where it did; empty when the backend does not know of a break. `owed` is None if the gradients have
    their noise.
    """

    label: str
    graph_break: str = ""
    owed: Owed | None = None


class InParts(Protocol):
    """A model whose parts are compiled each by itself (parts.py)."""

    def missing(self, releases: Iterable["Release"]) -> str:
        """What is wrong with the releases of one backward, which must be one of each part; empty if nothing is."""

    def rescaled(self, number: int) -> bool:
        """Whether the clipped sums of this part will not be added up over all ranks as they are."""


@dataclass(eq=False, slots=True)
class Release:
    """One run of a compiled backward. `peers` are all releases of the same call of backward(), this one included.
    `batch` is what `Ledger.batch` was at the forward, `moved` what it had of bounds that move, `probes_moved` how many
    releases had used up probes before it, `part` which part of which model was compiled (parts.py), None for a whole
    one, `seen` what its forward was given (seen_samples.py)."""

    info: ReleaseInfo
    number: int
    backward: int
    time: float
    peers: list["Release"] = field(repr=False)
    batch: Mapping[int, int] = field(default_factory=dict)
    moved: Moved | None = None
    probes_moved: int | None = None
    part: tuple[weakref.ref[InParts], int] | None = None
    seen: Sequence[Tensor] = ()


class Ledger:
    """Opens releases and counts them, which autograd's device threads may do; and knows what is called now. One per
    process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._last: Release | None = None
        self.epoch = 0
        self.part: tuple[InParts, int] | None = None
        """What is being called: a part of a model, by the model and a number."""
        self.graphs: list[Sequence[Any]] | None = None
        """What each compiled graph has returned that ran within this call of a part."""
        self.within = -1
        """The backward pass that runs others, which are one with it (two_passes.py); -1 if none does."""
        self.batch: Mapping[int, int] = {}
        """The place of what each loader of an engine has handed out last, by the name of the loader."""

    @contextlib.contextmanager
    def calling(self, model: InParts, number: int) -> Iterator[list[Sequence[Any]]]:
        """A part of a model is called. Gives `graphs`, as far as they have run."""
        graphs: list[Sequence[Any]] = []
        before = self.part, self.graphs
        self.part, self.graphs = (model, number), graphs
        try:
            yield graphs
        finally:
            self.part, self.graphs = before

    @contextlib.contextmanager
    def one_backward(self) -> Iterator[None]:
        """The backward passes that run within are those of the user's call, which may run several models."""
        before, self.within = self.within, backward_number()
        try:
            yield
        finally:
            self.within = before

    def open(self, info: ReleaseInfo, batch: Mapping[int, int] | None = None, *, alone: bool = False) -> Release:
        """A new release, listed with those that the running call of backward() has already made, unless it is made of
        earlier ones and stands `alone`."""
        backward = -1 if alone else self.within if self.within != -1 else backward_number()
        with self._lock:
            last = self._last
            peers = last.peers if last is not None and last.backward == backward != -1 else []
            release = Release(info, next(self._numbers), backward, time.time(), peers, batch or {})
            release.peers.append(release)
            self._last = release
        return release

    def count(self) -> int:
        """How many releases were made in this process."""
        return 0 if self._last is None else self._last.number

    def void(self) -> None:
        """Ends an epoch: receipts from before it no longer count. The number of releases goes on."""
        with self._lock:
            self.epoch += 1


LEDGER = Ledger()
