"""What flows between the parts of a model that are compiled each by itself (parts.py), watched while it runs.

A compiled part proves that samples do not mix inside. Between parts nothing at all is computed from samples, or from
what parts have made of them, or from what nobody knows the origin of. So what a part is given is what another one has
returned, or an argument of the whole model, or was made of the model's own buffers; and no sample decides what is
called.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from flashdp_compile.compat import TorchDispatchMode, foreign_hooks, is_of_sharding, real_tensors, tree_leaves
from flashdp_compile.errors import Refusal
from flashdp_compile.runtime.outputs import was_computed
from flashdp_compile.runtime.part_calls import check_buffers, keys_of, refuse_without_gradients

__all__ = ["Around", "Flow", "tensors_of"]

_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
SAMPLES, PUBLIC = "samples", "public"


class Known(NamedTuple):
    """What a tensor holds, and what it was when that was known: no op is needed to make another of it."""

    holding: str
    state: tuple[Any, ...]


class Flow:
    """Between the parts of `model`. `known`: what the tensors hold that the present forward may pass on. `samples`: the
    tensors that ever held some."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.known = WeakIdKeyDictionary()
        self.samples = WeakIdKeyDictionary()

    @contextlib.contextmanager
    def of(self, arguments: Any) -> Iterator[None]:
        """Within, the model's own forward runs, which was given these."""
        self.known.clear()
        self.mark(arguments, SAMPLES)
        self.mark([*self._model.parameters(), *self._public_buffers()], PUBLIC)
        try:
            with _Between(self):
                yield
        finally:
            self.known.clear()

    def mark(self, values: Any, holding: str) -> None:
        """Remembers what the tensors among these values hold.

        Raises Refusal if there could be others, within an object that is not looked into.
        """
        for value in _only_tensors(values):
            self.known[value] = Known(holding, _state(value))
            if holding == SAMPLES:
                self.samples[value] = True

    def returned(self, outputs: Any) -> None:
        """Remembers that these hold samples: none may come back as a buffer."""
        self.samples.update((value, True) for value in _only_tensors(outputs))

    def around(self, part: nn.Module, name: str) -> Around:
        """Watches what a part is given and returns."""
        around = Around(self, part, name, alone=part is self._model)
        part.register_forward_pre_hook(around.enter, prepend=True, with_kwargs=True)
        part.register_forward_hook(around.leave, always_call=True)
        return around

    def _public_buffers(self) -> Iterator[Tensor]:
        """Those that no part has computed. Raises Refusal if one is a tensor of an earlier forward."""
        for name, buffer in self._model.named_buffers():
            if buffer in self.samples:
                raise Refusal(
                    f"buffer {name} is a tensor that holds samples of an earlier call, which no clipping bounds. Keep "
                    "nothing of them"
                )
            if not was_computed(buffer):
                yield buffer


class _Between(TorchDispatchMode):
    """Refuses every op on samples, and on what nobody knows."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tensors_of((args, kwargs or {})):
            if getattr(self._flow.known.get(value), "holding", None) != PUBLIC:
                what = "samples, or on what was made of them," if value in self._flow.known else "a tensor"
                raise Refusal(
                    f"{func} is called{_user_line()} on {what} between two parts of a model that are compiled each by "
                    "itself. It is in no graph, so nothing is proved of it. Move it into a module that owns "
                    "parameters, next to what it belongs to; what holds no samples may be a buffer"
                )
        made = func(*args, **(kwargs or {}))
        self._flow.mark(made, PUBLIC)
        return made


class Around:
    """The hooks around a part: all that fully_shard does between them is its own affair."""

    def __init__(self, flow: Flow, part: nn.Module, name: str, alone: bool) -> None:
        self._flow, self._part, self._name, self._alone = flow, part, name, alone
        self._paused: list[Any] = []

    @property
    def entered(self) -> bool:
        return bool(self._paused)

    def enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._check(args, kwargs)
        elif self._flow.known and not self._alone:
            refuse_without_gradients(self._name)
        context = real_tensors()
        context.__enter__()
        self._paused.append(context)

    def leave(self, part: nn.Module, args: Any, outputs: Any) -> None:
        if self._paused:
            self._paused.pop().__exit__(None, None, None)
        if torch.is_grad_enabled():
            self._flow.mark(outputs, SAMPLES)

    def _check(self, args: Any, kwargs: Any) -> None:
        for hook in foreign_hooks(self._part):
            if not isinstance(getattr(hook, "__self__", None), Around):
                raise Refusal(
                    f"a part of the model has the hook {getattr(hook, '__qualname__', hook)}, which runs outside of "
                    "its graph, so nothing is proved of what it does. Remove it, or do the same in the module's forward"
                )
        if self._alone:
            return
        check_buffers(self._name, self._part, self._flow.known, self._flow.samples)
        for value in _only_tensors((args, kwargs)):
            known = self._flow.known.get(value)
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


def tensors_of(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _only_tensors(values: Any) -> Iterator[Tensor]:
    """Raises Refusal if there could be others, within an object that is not looked into."""
    for value in (*tree_leaves(values), *keys_of(values)):
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
