"""A model of which each part is compiled by itself, as fully_shard asks for: it gathers the parameters of a part just
before its forward, and lets go of them behind it.

What runs between the parts is watched by between_parts.py, how they are called by part_calls.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashdp_compile.compat import (
    came_of_waiting,
    groups_of,
    kept_back,
    leave_word,
    placed_parameters,
    prefetched_again,
    sharded_parameters,
    take_wide_gradients,
    unusual_sums,
    words_left,
)
from flashdp_compile.errors import FlashDPError, RanksError, Refusal
from flashdp_compile.runtime.between_parts import Flow, tensors_of
from flashdp_compile.runtime.part_calls import Around, check_call, check_results
from flashdp_compile.runtime.part_runs import PartRuns
from flashdp_compile.runtime.release import LEDGER, Release
from flashdp_compile.runtime.shard_watch import ShardWatch
from flashdp_compile.runtime.two_passes import backward_twice
from flashdp_compile.runtime.watch import find, watch

_MARK = "_flashdp_parts"
_TWICE = (
    "flashdp: the parts of this model are compiled already, each by itself, and fully_shard works between them: call "
    "the model as engine.compile has left it, without torch.compile around it"
)


class Parts:
    """The parts of `model` by name; `shards` are the watches of its sharded parameters, by their full names."""

    def __init__(
        self, model: nn.Module, parts: Mapping[str, nn.Module], shards: Mapping[str, ShardWatch], runs: PartRuns
    ) -> None:
        self.model, self.names, self._runs = model, list(parts), runs
        self._modules, self._shards = list(parts.values()), shards
        self._flow = Flow(model)
        self._groups: dict[int, list[Any]] = {}  # of fully_shard, by the number of a part
        self.trainable = frozenset(
            n for n, part in enumerate(self._modules) if any(p.requires_grad for p in part.parameters())
        )

    def install(self, compiled: Callable[[nn.Module], Callable[..., Any]]) -> None:
        """Puts `compiled(part)` in the place of each part's forward, and watches what runs between. Once for a model
        (`was_compiled`)."""
        setattr(self.model, _MARK, True)
        for number, part in enumerate(self._modules):
            around = Around(self._flow, part, self.names[number], alone=part is self.model)
            part.forward = self._forward(number, part, compiled(part), around)
        if self._modules != [self.model]:
            self.model.forward = self._watched(self.model.forward)

    def missing(self, releases: Iterable[Release]) -> str:
        """What is wrong with the releases of one backward, which must be one of each part that is trained."""
        parts = (release.part for release in releases)
        numbers = [part[1] for part in parts if part is not None and part[0]() is self]
        if len(set(numbers)) < len(numbers):
            return "a part of the model took part in it several times"
        if lacking := self.trainable - set(numbers):
            return f"{self.names[min(lacking)]} took no part in it"
        return ""

    def rescaled(self, number: int) -> bool:
        """Whether the clipped sums of this part will not be added up over all ranks as they are."""
        return bool(unusual_sums(self._groups[number]))

    def _forward(self, number: int, part: nn.Module, compiled: Callable[..., Any], around: Around) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                _refuse_twice()
            if torch.is_grad_enabled():
                check_call(self.names[number], around.entered)
                self._link(number, part)
            with LEDGER.calling(self, number) as graphs:
                outputs = compiled(part, *args, **kwargs)
            if torch.is_grad_enabled() and part is not self.model:
                check_results(self.names[number], outputs, (args, kwargs), graphs, self._flow)
            return outputs

        return forward

    def _link(self, number: int, part: nn.Module) -> None:
        """Tells the watches of parameters that are whole now of their shards, which must be those of the beginning."""
        linked = number in self._groups
        groups = self._groups[number] if linked else groups_of(part, self.model)  # a search of the whole model
        if wrong := unusual_sums(groups):
            raise FlashDPError(
                f"fully_shard was told to use {wrong}: clipped sums must be added up over all ranks as they are, in "
                "float32, by every backward. Leave it out; param_dtype=torch.bfloat16 is fine"
            )
        if kept_back(groups):
            kept_back(groups_of(self.model, self.model))
            raise FlashDPError(
                "fully_shard has kept gradients of an earlier backward, as set_requires_gradient_sync(False) or "
                "set_requires_all_reduce(False) has told it, and would add them to those of this one. They are cleared "
                "now: leave such settings as they are"
            )
        for parameter in (p for group in groups for p in sharded_parameters(group)):
            self._check_shard(self.names[number] or "the model", parameter)
        if linked:
            return
        for name, parameter in placed_parameters(part):
            take_wide_gradients(parameter)
            watched, full = watch(parameter), f"{self.names[number]}.{name}".lstrip(".")
            if watched is not None:
                watched.shard = self._shards[full]
        self._groups[number] = groups  # only now: what was refused may be put right, and called again

    def _check_shard(self, name: str, parameter: Tensor) -> None:
        trained = isinstance(find(parameter), ShardWatch)
        if trained and not parameter.requires_grad:
            raise FlashDPError(
                f"a parameter of {name}, of shape {tuple(parameter.shape)}, was frozen behind engine.compile: where "
                "ranks differ, fully_shard would add up other gradients than belong together. Freeze before "
                "engine.compile, or give it a learning rate of 0"
            )
        if not trained and parameter.requires_grad:
            raise FlashDPError(
                f"a parameter of {name}, of shape {tuple(parameter.shape)}, was frozen when the engine compiled the "
                "model, or has taken the place of another since (load_state_dict(assign=True), to_empty): nobody would "
                "add noise to its gradient. Do such things before engine.compile"
            )
        if len(parameter._post_accumulate_grad_hooks or ()) > 1:
            raise Refusal(
                f"a parameter of {name}, of shape {tuple(parameter.shape)}, has a hook on its gradient, which has no "
                "noise before the engine's step. Remove it"
            )

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def between(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                _refuse_twice()
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if self._runs.shared:
                _refuse_gradients_of((args, kwargs))
            with _said_on_all_ranks(), self._flow.of((args, kwargs)):
                outputs = forward(*args, **kwargs)
            if self._runs.shared:
                groups = (group for groups in self._groups.values() for group in groups)
                outputs = backward_twice(outputs, self._runs, prefetched_again(groups))
                self._flow.returned(outputs)
            return outputs

        return between


@contextlib.contextmanager
def _said_on_all_ranks() -> Iterator[None]:
    """What one rank refuses in its forward leaves the others waiting for it, where fully_shard gathers parameters: they
    are told why when they have waited in vain."""
    try:
        yield
    except FlashDPError as error:
        leave_word(f"{type(error).__name__}: {error}")
        raise
    except RuntimeError as error:
        if not came_of_waiting(error):
            raise
        told = "; ".join(words_left()) or "one of them has ended, or is busy with something else"
        raise RanksError(
            f"fully_shard has waited in vain for other ranks ({told}). Nothing was released. Ranks are out of step "
            "now: begin anew from a checkpoint"
        ) from error


def _refuse_gradients_of(arguments: Any) -> None:
    if any(value.requires_grad for value in tensors_of(arguments)):
        raise Refusal(
            "an argument of the model requires a gradient, which would be made twice: one bound for all parts takes "
            'two runs of the backward. Detach it, or clip by clipping="per_block"'
        )


def was_compiled(model: nn.Module) -> bool:
    """Whether it is that of some `Parts`."""
    return hasattr(model, _MARK)


@torch.compiler.disable(reason=_TWICE)  # where no break is allowed dynamo says so, and else calls this
def _refuse_twice() -> None:
    raise FlashDPError(_TWICE)
