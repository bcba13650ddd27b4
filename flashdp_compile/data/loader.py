"""A DataLoader whose batches are those of Poisson sampling, and that knows where in the run each of them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from flashdp_compile.accounting.sampling import Sampling
from flashdp_compile.checks import flag
from flashdp_compile.data.empty import empty_like_batch
from flashdp_compile.data.sampler import PoissonSampler
from flashdp_compile.errors import OptionError

_DRAWN = "the samples of a step are drawn by chance, as the accounting assumes: leave it out"
_REFUSED = {
    "batch_size": "the size of a logical batch is random: sample_rate says how large it is on average, "
    "physical_batch_size how many samples go through the model at once",
    "shuffle": _DRAWN,
    "sampler": _DRAWN,
    "batch_sampler": _DRAWN,
    "drop_last": "every logical batch counts, whatever its size: leave it out",
}


def private_loader(
    dataset: Any,
    *,
    sample_rate: float,
    steps: int,
    physical_batch_size: int | None = None,
    cap: int | None = None,
    seed: int | None = None,
    pad: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **dataloader_options: Any,
) -> PrivateLoader:
    """The batches of `steps` steps under Poisson sampling; other options go to `torch.utils.data.DataLoader`.

    `sample_rate`, `steps`, `physical_batch_size`, `cap` and `seed` are those of `PoissonSampler`. `dataset` has rows by
    index and a length. `collate_fn` never sees an empty list.

    pad    False: batches have the size that was drawn, 0 included. True: every batch is filled up to
           `physical_batch_size` with repeats of its own first row, or of row 0 if it has none, and comes as
           `(batch, weight)`; weight is float32 [physical_batch_size], 1 for rows that were drawn and 0 for the filling:

               for (x, y), weight in loader:
                   losses = F.cross_entropy(compiled(x), y, reduction="none")
                   loss = (losses * weight).mean()  # which flashdp turns into their sum over expected_batch_size

    A batch without samples is row 0, collated, and cut to no rows (`empty_like_batch`) or given the weight 0. Reading
    that row is harmless: cut, its tensors keep no more than shapes and dtypes; under the weight 0, its gradient is 0.
    So it has no part in what is released.

    Raises OptionError where a value is not allowed, or an option of the DataLoader contradicts the sampling.
    """
    sampler = PoissonSampler(
        rows(dataset), sample_rate, steps=steps, physical_batch_size=physical_batch_size, cap=cap, seed=seed
    )
    return PrivateLoader(dataset, sampler, pad=pad, collate_fn=collate_fn, **dataloader_options)


class PrivateLoader:
    """Iterates over micro-batches, made by `private_loader`.

    last           the batch just handed out ends its logical batch: the optimizer's step is due
    micro_batches  how many of the current logical batch have been handed out
    steps_done     logical batches whose last micro-batch has been handed out: that step counts as done, so a state
                   that is saved after the step goes on with the next
    sampler        the `PoissonSampler`
    dataloader     the DataLoader

    The first three speak of batches that were handed out, however far workers have read ahead. Iterating again goes on
    behind the logical batches that are done. One iteration at a time: an older one that is continued raises
    RuntimeError.
    """

    def __init__(
        self, dataset: Any, sampler: PoissonSampler, /, *, pad: bool = False, **dataloader_options: Any
    ) -> None:
        _check_options(dataloader_options)
        if rows(dataset) != sampler.sample_size:
            raise OptionError(f"sample_size={sampler.sample_size} of the sampler, but dataset has {len(dataset)} rows")
        if flag("pad", pad) and sampler.physical_batch_size is None:
            raise OptionError("physical_batch_size=None contradicts pad=True, which fills every batch up to that size")
        self.sampler, self.pad = sampler, pad
        self._physical = sampler.physical_batch_size if pad else None
        self.dataloader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=_NeverEmpty(sampler, self._physical), **dataloader_options
        )
        self.last, self.micro_batches = False, 0
        self._iteration = 0  # number of the newest
        self._begun: int | None = None  # steps that were done when it began; None if none is under way

    @property
    def steps_done(self) -> int:
        return self.sampler.steps_done

    @property
    def sampling(self) -> Sampling:
        """For `accounting.epsilon(sampling=...)`."""
        return self.sampler.sampling

    def __iter__(self) -> Iterator[Any]:
        self._iteration += 1
        mine, self._begun = self._iteration, self.steps_done
        self.last, self.micro_batches = False, 0
        try:
            for batch in self.dataloader:
                self.micro_batches = 1 if self.last else self.micro_batches + 1
                size, self.last = self.sampler.received()
                yield self._handed_out(batch, size)
                if mine != self._iteration:  # before the next is taken: iterations may share their workers
                    raise RuntimeError("this iteration has ended: the loader was iterated anew, or took a state")
        finally:
            if mine == self._iteration:
                self._begun = None

    def _handed_out(self, batch: Any, size: int) -> Any:
        if self._physical is not None:
            return batch, self._weight(size, self._physical)
        return batch if size else empty_like_batch(batch)

    def _weight(self, size: int, physical: int) -> Tensor:
        weight = (torch.arange(physical) < size).float()
        return weight.pin_memory() if self.dataloader.pin_memory and torch.cuda.is_available() else weight

    def __len__(self) -> int:
        """Batches of the iteration under way, from its beginning, or else of the next: what a loop over the loader
        gives. It is `steps` in a new run. TypeError if micro-batches make it a matter of chance."""
        begun = self.steps_done if self._begun is None else self._begun
        return len(self.sampler) + self.steps_done - begun

    def state_dict(self) -> dict[str, Any]:
        """`PoissonSampler.state_dict`: the logical batches that are done."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`PoissonSampler.load_state_dict`: the next iteration goes on behind what is done; one under way has ended."""
        self.sampler.load_state_dict(state)
        self._iteration, self._begun = self._iteration + 1, None
        self.last, self.micro_batches = False, 0


class _NeverEmpty(Sampler[list[int]]):
    """Index lists with at least one index, of `size` indices if that is given: filled up before rows are read, so that
    any collate_fn can make a batch of them."""

    def __init__(self, batches: PoissonSampler, size: int | None) -> None:
        self.batches, self.size = batches, size

    def __iter__(self) -> Iterator[list[int]]:
        return map(self._filled, iter(self.batches))

    def _filled(self, indices: list[int]) -> list[int]:
        first = indices[0] if indices else 0
        return indices + [first] * ((self.size or 1) - len(indices))


def rows(dataset: Any) -> int:
    """How many samples a data set has. Raises OptionError if it has none, or cannot be read by index."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise OptionError(
            f"dataset is a {type(dataset).__name__}, without rows by index and a length; allowed: a map-style dataset, "
            "as every sample must be within reach of every step"
        )
    if len(dataset) == 0:
        raise OptionError("dataset is empty; allowed: at least one sample")
    return len(dataset)


def _check_options(options: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if name in options:
            raise OptionError(f"{name}={options[name]!r} contradicts Poisson sampling: {why}")
    if options.get("in_order", True) is not True:
        raise OptionError(
            "in_order=False contradicts logical batches: their micro-batches must arrive in the order in which they "
            "were drawn, so that the last one is known. Leave it out"
        )
