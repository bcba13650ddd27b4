"""The batches of a run under Poisson sampling, and what has become of them at the other end of a DataLoader.

A DataLoader reads a sampler ahead of the loop that uses its batches. So the sampler records each micro-batch as it
hands it to the DataLoader, which keeps the order, and `received` takes the records out again: where a run stands is
counted in batches that arrived.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from flashdp_compile.accounting.sampling import Poisson, Sampling, TruncatedPoisson, rate
from flashdp_compile.checks import first_difference, integer, not_allowed
from flashdp_compile.data.draw import generator, logical_batch
from flashdp_compile.errors import OptionError

_log = logging.getLogger("flashdp_compile")
_STEPS_DONE, _SEED_CHECK = "steps_done", "seed_check"
_SAME = ("sample_size", "sample_rate", "steps", "cap")  # what a state must share with the sampler that takes it


class MicroBatch(NamedTuple):
    """A part of a logical batch that goes through the model at once."""

    size: int
    """Number of its samples, possibly 0."""

    last: bool
    """It ends its logical batch: the optimizer's step is due."""


class Part(NamedTuple):
    """What one of several processes takes of every logical batch: all of them draw the same and share it."""

    rank: int
    ranks: int
    secret: int
    """128 bits, the same on all ranks, and known to nobody else."""


ALONE = Part(0, 1, 0)


class PoissonSampler(Sampler[list[int]]):
    """The indices of `steps` logical batches, as the `batch_sampler` of a DataLoader.

    sample_size          number of samples
    sample_rate          probability with which each of them takes part in a step, independently of all others
    steps                logical batches, each of which is one optimizer step
    physical_batch_size  a logical batch is cut into micro-batches of at most so many samples, in random order. None:
                         each is one batch
    cap                  a step keeps at most so many of its samples, chosen at random (`accounting.TruncatedPoisson`)
    seed                 None: every logical batch is drawn from 128 fresh bits of the operating system. A number: the
                         same batches on every run, for tests only, as whoever knows it knows who took part

    least                no micro-batch has fewer samples, unless it has none or its whole logical batch does; then
                         physical_batch_size is at least 2 least - 1
    part                 which part this process takes, of as many micro-batches as the largest: some may be empty

    A logical batch without samples is one micro-batch without indices. `sampling` is what was drawn, in the words of
    the accounting. Iterating starts behind the logical batches that are done. Without a seed every iteration draws
    anew, so parts of several ranks are those of one draw only while their `iterations` are equal.

    Raises OptionError where a value is not allowed.
    """

    def __init__(
        self,
        sample_size: int,
        sample_rate: float,
        *,
        steps: int,
        physical_batch_size: int | None = None,
        cap: int | None = None,
        seed: int | None = None,
        least: int = 1,
        part: Part = ALONE,
    ) -> None:
        self.sample_size = integer("sample_size", sample_size, 1)
        self.sample_rate = rate("sample_rate", sample_rate)
        self.steps = integer("steps", steps, 0)
        self.physical_batch_size = integer("physical_batch_size", physical_batch_size, 1, optional=True)
        self.cap = integer("cap", cap, 1, optional=True)
        self.seed = integer("seed", seed, 0, optional=True)
        self.steps_done = 0
        self._least = integer("least", least, 1)
        enough = 2 * self._least - 1  # then the last part can take what it lacks from the one before it
        if (self.physical_batch_size or enough) < enough:
            raise not_allowed("physical_batch_size", physical_batch_size, f"at least {enough}, or None")
        self._part = part
        self.iterations = 0  # that have begun: a DataLoader with workers makes one that it does not use
        self._record: deque[MicroBatch] = deque()
        if self.seed is not None:
            _warn_once("a seed draws the samples: whoever knows it knows who took part; give none outside tests")

    @property
    def sampling(self) -> Sampling:
        """For `accounting.epsilon(sampling=...)`."""
        if self.cap is None:
            return Poisson(self.sample_rate, self.sample_size)
        return TruncatedPoisson(self.sample_rate, self.cap, self.sample_size)

    def __iter__(self) -> Iterator[list[int]]:
        # outside of the generator: `received` must ask the newest iteration, also before it has begun
        self._record = deque()
        return self._micro_batches(self._record)

    def _micro_batches(self, record: deque[MicroBatch]) -> Iterator[list[int]]:
        self.iterations += 1
        rank, ranks, secret = self._part
        shared = (secret, self.iterations) if ranks > 1 else ()
        size = self.physical_batch_size or self.sample_size
        for step in range(self.steps_done, self.steps):
            drawn = logical_batch(self.sample_size, self.sample_rate, self.cap, generator(self.seed, step, shared))
            first, last, largest = _share(len(drawn), rank, ranks, self._least)
            parts = _cut(drawn[first:last], size, self._least)
            parts += [[]] * (-(-largest // size) - len(parts))
            for number, part in enumerate(parts, 1):
                record.append(MicroBatch(len(part), number == len(parts)))
                yield part

    def received(self) -> MicroBatch:
        """What the batch is that the loop has just got; to be called for each, in order, as a `PrivateLoader` does.

        The last one of a logical batch makes it done. Its step may still be to come: after an interruption just then
        a run has one release less than it accounts for, and never one more.
        """
        if not self._record:
            raise RuntimeError("received() is called once for each batch of the newest iteration, and none is left")
        found = self._record.popleft()
        self.steps_done += found.last
        return found

    def __len__(self) -> int:
        """Batches that an iteration gives which begins now. TypeError if micro-batches make it a matter of chance."""
        largest = -(-min(self.sample_size, self.cap or self.sample_size) // self._part.ranks)
        if self.physical_batch_size is not None and self.physical_batch_size < largest:
            raise TypeError(
                "the number of micro-batches is random, so there is no len(): a logical batch may be larger than "
                f"physical_batch_size={self.physical_batch_size}. Count logical batches by steps and steps_done"
            )
        return self.steps - self.steps_done

    def state_dict(self) -> dict[str, Any]:
        """How many logical batches are done, and the settings with which they were drawn, without the seed."""
        same = {name: getattr(self, name) for name in _SAME}
        return {_STEPS_DONE: self.steps_done, **same, _SEED_CHECK: _seed_check(self.seed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the logical batches that are done; one that was cut short begins anew.

        With the same seed again, the run draws what it would have drawn without the interruption. Without one it draws
        anew, and has to: a batch that is drawn a second time, to be released with other noise, is not the independent
        draw that the accounting of Poisson sampling speaks of. `physical_batch_size` may change, as it has no part in
        what is drawn.

        Raises OptionError, and changes nothing, if the state was saved with other settings.
        """
        missing = [name for name in (_STEPS_DONE, *_SAME, _SEED_CHECK) if name not in state]
        if missing:
            raise OptionError(f"the state has no {', '.join(missing)}: it is not what state_dict() of a sampler gave")
        if (name := first_difference({n: getattr(self, n) for n in _SAME}, {n: state[n] for n in _SAME})) is not None:
            raise OptionError(
                f"{name}={getattr(self, name)!r} is not what the state was saved with, {state[name]!r}: the "
                "accounting of the run holds for one setting"
            )
        if state[_SEED_CHECK] != _seed_check(self.seed):
            raise OptionError("seed is not the one that the state was saved with; None and None are the same")
        done = integer(_STEPS_DONE, state[_STEPS_DONE], 0)
        if done > self.steps:
            raise not_allowed(_STEPS_DONE, done, f"at most steps, {self.steps}")
        self.steps_done = done
        self._record = deque()


def _share(count: int, rank: int, ranks: int, least: int) -> tuple[int, int, int]:
    """First and last (exclusive) of so many samples that are a rank's, and how many the largest part has. Where parts
    would have less than `least`, some ranks have none."""
    ranks = min(ranks, max(count // least, 1))
    each, more = divmod(count, ranks)
    first, last = (min(r * each + min(r, more), count) for r in (rank, rank + 1))
    return first, last, each + (more > 0)


def _cut(drawn: list[int], size: int, least: int) -> list[list[int]]:
    """Parts of at most `size`, and at least `least` where that can be: the last takes from the one before it."""
    parts = [drawn[start : start + size] for start in range(0, len(drawn), size)] or [[]]
    missing = least - len(parts[-1])
    if len(parts) > 1 and missing > 0 and len(parts[-2]) - missing >= least:
        parts[-1] = parts[-2][-missing:] + parts[-1]
        parts[-2] = parts[-2][:-missing]
    return parts


def _seed_check(seed: int | None) -> int | None:
    """16 bits: enough to notice another seed, too few to find it. A checkpoint may be published, a seed must not be."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"flashdp_compile data {seed}".encode()).digest()[:2], "little")


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning("flashdp: %s", text)
