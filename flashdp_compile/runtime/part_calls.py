"""Calls of the parts of a model (parts.py): what each is given, and whether it has gone through its graph, where all is
proved, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from flashdp_compile.compat import foreign_hooks, is_of_sharding, real_tensors, tree_leaves
from flashdp_compile.errors import Refusal
from flashdp_compile.runtime.between_parts import SAMPLES, Flow, only_tensors, state_of, tensors_of


class Around:
    """The hooks around a part: all that fully_shard does between them is its own affair. `alone`: it is the whole
    model."""

    def __init__(self, flow: Flow, part: nn.Module, name: str, alone: bool) -> None:
        self._flow, self._part, self._name, self._alone = flow, part, name, alone
        self._paused: list[Any] = []
        part.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
        part.register_forward_hook(self.leave, always_call=True)

    @property
    def entered(self) -> bool:
        return bool(self._paused)

    def enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._check(args, kwargs)
        elif self._flow.known and not self._alone:
            _refuse_without_gradients(self._name)
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
        _check_buffers(self._name, self._part, self._flow)
        for value in only_tensors((args, kwargs)):
            known = self._flow.known.get(value)
            if known is None:
                raise Refusal(
                    f"a part of the model is given a tensor of shape {tuple(value.shape)} that no other part has "
                    "returned, and that is no argument of the whole model: nothing is proved of how it was made. Parts "
                    "are called by the model's own forward; checkpoint a part inside of its forward, not from outside"
                )
            if known.state != state_of(value):
                raise Refusal(
                    f"a tensor of shape {tuple(value.shape)} was changed before it came to a part of the model: "
                    "nothing is proved of what did it, such as an assignment to .data or an autograd.Function"
                )
            if value._backward_hooks and not all(map(is_of_sharding, value._backward_hooks.values())):
                raise Refusal(
                    f"a tensor of shape {tuple(value.shape)} that a part of the model is given has a hook on its "
                    "gradient, which could mix samples. Remove it"
                )


def check_call(name: str, entered: bool) -> None:
    """Raises Refusal for a forward that was not called by the module, so that nobody has looked at its arguments."""
    if not entered:
        raise Refusal(
            f"the forward of {name or 'the model'} is called by itself, where nothing is known of its arguments. Call "
            "the module, and parts by the model's own forward"
        )


def _refuse_without_gradients(name: str) -> NoReturn:
    """Raises Refusal: a part was called without gradients within a training forward."""
    raise Refusal(
        f"{name or 'a part of the model'} is called under torch.no_grad() within a forward of the whole model that is "
        "to be trained: nothing is proved of it there. Leave no_grad out: what is frozen needs none"
    )


def _check_buffers(name: str, part: nn.Module, flow: Flow) -> None:
    """Raises Refusal for a buffer that has been given samples outside of all graphs, where it would count as public."""
    for own, buffer in part.named_buffers():
        before = flow.known.get(buffer)
        if buffer in flow.samples or before is not None and before.state[-1] != buffer.data_ptr():
            raise Refusal(
                f"buffer {own} of {name} was assigned between two parts, and may hold samples. Give it to the part as "
                "an argument"
            )


def check_results(name: str, outputs: Any, given: Any, graphs: Sequence[Sequence[Any]], flow: Flow) -> None:
    """Raises Refusal unless each tensor was made by the one graph that ran, or was given to it, or holds no samples."""
    if len(graphs) != 1:
        raise Refusal(
            f"{name} ran {len(graphs)} graphs, where one must hold all that it does: something keeps torch.compile "
            "from it (torch.compiler.disable, a stance, fullgraph=False)"
        )
    proved = {id(value) for value in (*tree_leaves(given), *graphs[0])}
    for value in tensors_of(outputs):
        if id(value) not in proved and not flow.is_public(value):
            raise Refusal(
                f"{name} returns a tensor of shape {tuple(value.shape)} that its graph has not made, such as one that "
                "was kept from the forward before: nothing is proved of what it holds"
            )
