"""What flows between the parts of a model that are compiled each by itself (parts.py), watched while it runs.

A compiled part proves that samples do not mix inside. Between parts nothing at all is computed from samples, or from
what parts have made of them, or from what nobody knows the origin of. So what a part is given is what another one has
returned, or an argument of the whole model, or was made of the model's own buffers; and no sample decides what is
called.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from flashdp_compile.compat import TorchDispatchMode, tree_leaves
from flashdp_compile.errors import Refusal
from flashdp_compile.runtime.outputs import was_computed

__all__ = ["SAMPLES", "Flow", "only_tensors", "state_of", "tensors_of"]

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
        for value in only_tensors(values):
            self.known[value] = Known(holding, state_of(value))
            if holding == SAMPLES:
                self.samples[value] = True

    def is_public(self, value: Tensor) -> bool:
        """Whether it is known to hold no samples."""
        known = self.known.get(value)
        return known is not None and known.holding == PUBLIC

    def returned(self, outputs: Any) -> None:
        """Remembers that these hold samples: none may come back as a buffer."""
        self.samples.update((value, True) for value in only_tensors(outputs))

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
            if not self._flow.is_public(value):
                what = "samples, or on what was made of them," if value in self._flow.known else "a tensor"
                raise Refusal(
                    f"{func} is called{_user_line()} on {what} between two parts of a model that are compiled each by "
                    "itself. It is in no graph, so nothing is proved of it. Move it into a module that owns "
                    "parameters, next to what it belongs to; what holds no samples may be a buffer"
                )
        made = func(*args, **(kwargs or {}))
        self._flow.mark(made, PUBLIC)
        return made


def state_of(value: Tensor) -> tuple[Any, ...]:
    return value.grad_fn, -1 if value.is_inference() else value._version, value.data_ptr()


def tensors_of(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def only_tensors(values: Any) -> Iterator[Tensor]:
    """Raises Refusal if there could be others, within an object that is not looked into."""
    for value in (*tree_leaves(values), *_keys_of(values)):
        if isinstance(value, Tensor):
            yield value
        elif type(value) not in _PLAIN:
            raise Refusal(
                f"a {type(value).__name__} is passed to or by a model that is compiled part by part, and may hold "
                "tensors that nothing is proved of: pass tensors, or tuples, lists and dicts of them"
            )


def _keys_of(values: Any) -> Iterator[Any]:
    """Of the dicts within: torch looks for tensors among their values alone."""
    if isinstance(values, Mapping):
        yield from values
        values = tuple(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _keys_of(value)


def _user_line() -> str:
    """Where the caller's own code is, outside of torch and of this package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "flashdp_compile" not in name:
            return f" ({name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
