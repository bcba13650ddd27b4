"""A model of which each part is compiled by itself, as fully_shard asks for: it gathers the parameters of a part just
before its forward, and lets go of them behind it.

A compiled part proves that samples do not mix inside. What runs between the parts is proved here, while it runs:
nothing at all is computed there from samples, or from what parts have made of them, or from what nobody knows the
origin of. So what a part is given is what another one has returned, or an argument of the whole model, or was made of
the model's own buffers; and no sample decides what is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from flashdp_compile.compat import (
    TorchDispatchMode,
    foreign_hooks,
    groups_of,
    is_of_sharding,
    prefetched_again,
    real_tensors,
    sharded_parameters,
    take_wide_gradients,
    tree_leaves,
    unusual_sums,
)
from flashdp_compile.errors import FlashDPError, Refusal
from flashdp_compile.runtime.outputs import was_computed
from flashdp_compile.runtime.part_runs import PartRuns
from flashdp_compile.runtime.release import LEDGER, Release
from flashdp_compile.runtime.shard_watch import ShardWatch
from flashdp_compile.runtime.two_passes import backward_twice
from flashdp_compile.runtime.watch import find, watch

_MARK = "_flashdp_parts"
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
SAMPLES, PUBLIC = "samples", "public"
_TWICE = (
    "flashdp: the parts of this model are compiled already, each by itself, and fully_shard works between them: call "
    "the model as engine.compile has left it, without torch.compile around it"
)


class Known(NamedTuple):
    """What a tensor holds, and what it was when that was known: no op is needed to make another of it."""

    holding: str
    state: tuple[Any, ...]


class Parts:
    """The parts of `model` by name; `shards` are the watches of its sharded parameters, by their full names."""

    def __init__(
        self, model: nn.Module, parts: Mapping[str, nn.Module], shards: Mapping[str, ShardWatch], runs: PartRuns
    ) -> None:
        self.model, self.names, self._runs = model, list(parts), runs
        self._modules, self._shards = list(parts.values()), shards
        self.known = WeakIdKeyDictionary()  # what the tensors hold that the present forward may pass on
        self._samples = WeakIdKeyDictionary()  # tensors that ever held some
        self._groups: dict[int, list[Any]] = {}  # of fully_shard, by the number of a part
        self.trainable = frozenset(
            n for n, part in enumerate(self._modules) if any(p.requires_grad for p in part.parameters())
        )

    def install(self, compiled: Callable[[nn.Module], Callable[..., Any]]) -> None:
        """Puts `compiled(part)` in the place of each part's forward, and watches what runs between. Once for a model
        (`was_compiled`)."""
        setattr(self.model, _MARK, True)
        for number, part in enumerate(self._modules):
            part.forward = self._forward(number, part, compiled(part))
            around = _Around(self, part)
            part.register_forward_pre_hook(around.enter, prepend=True, with_kwargs=True)
            part.register_forward_hook(around.leave, always_call=True)
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

    def mark(self, values: Any, holding: str) -> None:
        """Remembers what the tensors among these values hold.

        Raises Refusal if there could be others, within an object that is not looked into.
        """
        for value in _only_tensors(values):
            self.known[value] = Known(holding, _state(value))
            if holding == SAMPLES:
                self._samples[value] = True

    def _forward(self, number: int, part: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                _refuse_twice()
            if torch.is_grad_enabled():
                self._link(number, part)
            before, LEDGER.part = LEDGER.part, (self, number)
            try:
                return compiled(part, *args, **kwargs)
            finally:
                LEDGER.part = before

        return forward

    def _link(self, number: int, part: nn.Module) -> None:
        """Tells the watches of parameters that are whole now of their shards, which must be those of the beginning."""
        linked = number in self._groups
        if not linked:  # a search of the whole model
            self._groups[number] = groups_of(part, self.model)
        groups = self._groups[number]
        if wrong := unusual_sums(groups):
            raise FlashDPError(
                f"fully_shard was told to use {wrong}: clipped sums must be added up over all ranks as they are, in "
                "float32, by every backward. Leave it out; param_dtype=torch.bfloat16 is fine"
            )
        for parameter in (p for group in groups for p in sharded_parameters(group)):
            self._check_shard(self.names[number] or "the model", parameter)
        if linked:
            return
        for name, parameter in part.named_parameters():
            take_wide_gradients(parameter)
            watched, full = watch(parameter), f"{self.names[number]}.{name}".lstrip(".")
            if watched is not None:
                watched.shard = self._shards[full]

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

    def _public_buffers(self) -> Iterator[Tensor]:
        """Those that no part has computed. Raises Refusal if one is a tensor of an earlier forward."""
        for name, buffer in self.model.named_buffers():
            if buffer in self._samples:
                raise Refusal(
                    f"buffer {name} is a tensor that holds samples of an earlier call, which no clipping bounds. Keep "
                    "nothing of them"
                )
            if not was_computed(buffer):
                yield buffer

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def between(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                _refuse_twice()
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self.known.clear()
            if self._runs.shared:
                _refuse_gradients_of((args, kwargs))
            self.mark((args, kwargs), SAMPLES)
            self.mark([*self.model.parameters(), *self._public_buffers()], PUBLIC)
            try:
                with _Between(self):
                    outputs = forward(*args, **kwargs)
            finally:
                self.known.clear()
            if not self._runs.shared:
                return outputs
            outputs = backward_twice(outputs, self._runs, prefetched_again(self.model))
            self._samples.update((value, True) for value in _tensors(outputs))
            return outputs

        return between


def _refuse_gradients_of(arguments: Any) -> None:
    if any(value.requires_grad for value in _tensors(arguments)):
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


class _Between(TorchDispatchMode):
    """Refuses every op on samples, and on what nobody knows."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _tensors((args, kwargs or {})):
            if getattr(self._parts.known.get(value), "holding", None) != PUBLIC:
                what = "samples, or on what was made of them," if value in self._parts.known else "a tensor"
                raise Refusal(
                    f"{func} is called{_user_line()} on {what} between two parts of a model that are compiled each by "
                    "itself. It is in no graph, so nothing is proved of it. Move it into a module that owns "
                    "parameters, next to what it belongs to; what holds no samples may be a buffer"
                )
        made = func(*args, **(kwargs or {}))
        self._parts.mark(made, PUBLIC)
        return made


class _Around:
    """The hooks around a part: all that fully_shard does between them is its own affair."""

    def __init__(self, parts: Parts, part: nn.Module) -> None:
        self._parts, self._part = parts, part
        self._paused: list[Any] = []

    def enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._check(args, kwargs)
        context = real_tensors()
        context.__enter__()
        self._paused.append(context)

    def leave(self, part: nn.Module, args: Any, outputs: Any) -> None:
        if self._paused:
            self._paused.pop().__exit__(None, None, None)
        if torch.is_grad_enabled():
            self._parts.mark(outputs, SAMPLES)

    def _check(self, args: Any, kwargs: Any) -> None:
        for hook in foreign_hooks(self._part):
            if not isinstance(getattr(hook, "__self__", None), _Around):
                raise Refusal(
                    f"a part of the model has the hook {getattr(hook, '__qualname__', hook)}, which runs outside of "
                    "its graph, so nothing is proved of what it does. Remove it, or do the same in the module's forward"
                )
        if self._part is self._parts.model:
            return
        for value in _only_tensors((args, kwargs)):
            known = self._parts.known.get(value)
            if known is None:
                raise Refusal(
                    f"a part of the model is given a tensor of shape {tuple(value.shape)} that no other part has "
                    "returned, and that is no argument of the whole model: nothing is proved of how it was made. Parts "
                    "are called by the model's own forward; checkpoint a part inside of its forward, not from outside"
                )
            if known.state != _state(value):
                raise Refusal(
                    f"a tensor of shape {tuple(value.shape)} was changed before it came to a part of the model: "
                    "nothing is proved of what did it, such as an assignment to .data or an autograd.Function"
                )
            if value._backward_hooks and not all(map(is_of_sharding, value._backward_hooks.values())):
                raise Refusal(
                    f"a tensor of shape {tuple(value.shape)} that a part of the model is given has a hook on its "
                    "gradient, which could mix samples. Remove it"
                )


def _state(value: Tensor) -> tuple[Any, ...]:
    return value.grad_fn, -1 if value.is_inference() else value._version, value.data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _only_tensors(values: Any) -> Iterator[Tensor]:
    """Raises Refusal if there could be others, within an object that is not looked into."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value
        elif type(value) not in _PLAIN:
            raise Refusal(
                f"a {type(value).__name__} is passed to or by a model that is compiled part by part, and may hold "
                "tensors that nothing is proved of: pass tensors, or tuples, lists and dicts of them"
            )


def _user_line() -> str:
    """Where the caller's own code is, outside of torch and of this package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "flashdp_compile" not in name:
            return f" ({name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
