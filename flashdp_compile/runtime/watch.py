"""Follows what is in one parameter's p.grad: a single untouched release, or anything else.

The watch of a parameter is stored as a tensor hook of that parameter and nowhere else. So it lives exactly as long as
the parameter, is found through it, needs no table of addresses, and is called in every backward pass, compiled or not,
even though autograd makes and drops the AccumulateGrad node of a parameter as it likes.

A release is recognised on its way by a weak reference to the gradient tensor and its version counter. Another
contribution to the same parameter in the same backward changes one of the two: autograd's input buffer either makes a
new tensor or adds in place, which raises the version. No strong reference is kept, as AccumulateGrad copies a
gradient that somebody else holds instead of taking it.
"""

import enum
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flashdp_compile.compat import eager_switches, hidden_from_dynamo, stays_in_place
from flashdp_compile.runtime.release import LEDGER, Release


class Fault(enum.Enum):
    """Why a gradient is not exactly one release."""

    PLAIN = enum.auto()  # made by a backward that flashdp did not compile
    MIXED = enum.auto()  # a release plus something else within one backward
    STALE = enum.auto()  # a release added onto a gradient of unknown origin
    ACCUMULATED = enum.auto()  # a release added onto an earlier release
    REPLACED = enum.auto()  # p.grad was assigned after the backward
    STEPPED = enum.auto()  # the release was already used by a step
    VOID = enum.auto()  # receipts were cleared by torch._dynamo.reset()
    GRAPHS = enum.auto()  # one backward ran several compiled graphs
    BACKWARDS = enum.auto()  # the parameters of one step hold releases of several backwards
    OWED = enum.auto()  # a sum lacks its noise, and no engine adds it at this step
    FOREIGN = enum.auto()  # at an engine's step: what it has not compiled, or compiled otherwise
    REPEATED = enum.auto()  # two backward passes over one forward, while noise is owed
    PARTS = enum.auto()  # a backward went through some parts of a model only, or several times through one
    RESCALED = enum.auto()  # fully_shard was told behind the forward to add gradients up otherwise
    ROUNDED = enum.auto()  # clipped sums were rounded to less than float32 on their way
    LOST = enum.auto()  # clipped sums of a part of the model never came back from the other ranks


class Content:
    """What is known of one gradient tensor: made by `release`, or at fault; possibly added onto `earlier`."""

    __slots__ = ("grad", "release", "fault", "causes", "earlier", "dirty", "epoch", "stepped")

    def __init__(self, grad: Tensor, release: Release | None, fault: Fault | None, causes: tuple[str, ...]) -> None:
        self.grad = weakref.ref(grad)
        self.release = release
        self.fault = fault
        self.causes = causes
        self.earlier: Content | None = None
        self.dirty: Tensor | None = None  # a device flag: was the tensor nonzero before the release was added?
        self.epoch = LEDGER.epoch
        self.stepped = False


class Pending:
    """A gradient that a compiled backward has just handed to autograd, on its way to the parameter."""

    __slots__ = ("grad", "version", "release", "earlier", "dirty")

    def __init__(self, grad: Tensor, release: Release, earlier: Content | None, dirty: Tensor | None) -> None:
        self.grad = weakref.ref(grad)
        self.version = grad._version
        self.release = release
        self.earlier = earlier
        self.dirty = dirty


class Held:
    """Clipped sums that lack their noise: of one parameter, over the backward passes `releases`."""

    __slots__ = ("total", "releases", "fault")

    def __init__(self, total: Tensor, release: Release) -> None:
        self.total = total.clone() if release.info.owed is not None and release.info.owed.reused else total
        self.releases = [release]
        self.fault: Fault | None = None

    def add(self, total: Tensor, release: Release) -> None:
        self.total = self.total + total  # not in place: a graph may give two parameters one tensor
        self.releases.append(release)
        if release.info.owed != self.releases[0].info.owed:
            self.fault = Fault.FOREIGN


class Watch:
    """The hooks and the state of one parameter. Being called as tensor hook, it sees the summed incoming gradient.

    Only flashdp's parameters have one: every optimizer that holds a watched parameter is guarded.
    """

    __slots__ = ("name", "pending", "arriving", "content", "held", "shard")

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.pending: Pending | None = None
        self.arriving: Pending | Fault | None = Fault.PLAIN  # None: nothing
        self.content: Content | None = None
        self.held: Held | None = None
        self.shard: Any = None
        """Of a parameter that fully_shard has put together: the watch of what an optimizer has (shard_watch.py)."""

    def install(self, parameter: Tensor) -> None:
        """Lets this be the watch of a parameter that has none."""
        parameter.register_hook(self)
        parameter.register_post_accumulate_grad_hook(self.accumulated)

    def hold(self, total: Tensor, release: Release, fault: Fault | None) -> None:
        """Called by the compiled node, which sends nothing to autograd then: a sum without noise is never in p.grad,
        where anyone could change it or step on it."""
        if self.held is None:
            self.held = Held(total, release)
        else:
            self.held.add(total, release)
        self.held.fault = self.held.fault or fault

    def announce(self, parameter: Tensor, grad: Tensor, release: Release) -> None:
        """Called by the compiled node: `grad` is `release`'s gradient of `parameter`, not yet accumulated."""
        self._surround(parameter)
        base = parameter.grad
        if base is None:
            self.pending = Pending(grad, release, None, None)
            return
        content = self.content
        if content is not None and content.grad() is not base:
            content = None
        if content is not None and content.dirty is not None:
            resolve([content])
        # zero_grad(set_to_none=False) leaves zeros: whether it did is asked on the device and read at the step
        dirty = base.detach().any() if base.layout == torch.strided else torch.ones((), dtype=torch.bool)
        self.pending = Pending(grad, release, content, dirty)

    def _surround(self, parameter: Tensor) -> None:
        """Makes this the last tensor hook and the first one after accumulation, whatever was registered since.

        Autograd reads the dictionaries in the order of insertion, when it calls the hooks: after this.
        """
        before: dict[int, Any] = parameter._backward_hooks or {}
        after: dict[int, Any] = parameter._post_accumulate_grad_hooks or {}
        mine = next((key for key, hook in before.items() if hook is self), None)
        if mine is not None and next(reversed(before)) != mine:
            before[mine] = before.pop(mine)
        if after and next(iter(after.values())) != self.accumulated:
            for key, hook in list(after.items()):
                if hook != self.accumulated:
                    after[key] = after.pop(key)

    @hidden_from_dynamo
    def __call__(self, grad: Tensor | None) -> None:
        pending, self.pending = self.pending, None
        if grad is None:  # a sum that lacks its noise was taken away
            self.arriving = None
        elif pending is None:
            self.arriving = Fault.PLAIN
        elif pending.grad() is grad and pending.version == grad._version:
            self.arriving = pending
        else:
            self.arriving = Fault.MIXED

    @hidden_from_dynamo
    def accumulated(self, parameter: Tensor) -> None:
        """Called after autograd has stored or added the incoming gradient."""
        arriving, self.arriving = self.arriving, Fault.PLAIN
        grad = parameter.grad
        if arriving is None:
            return
        if grad is None:  # another hook has taken it away
            self.content = None
        elif isinstance(arriving, Fault):
            self.content = Content(grad, None, arriving, tuple(eager_switches()))
        else:
            self.content = content = Content(grad, arriving.release, None, ())
            content.earlier, content.dirty = arriving.earlier, arriving.dirty
        if grad is not None and self.shard is not None:  # no CUDA graph writes to it again: parts have none
            parameter.grad = stays_in_place(grad)

    def judge(self, grad: Tensor) -> Content | Fault:
        """The content of p.grad, `grad`, if it is exactly one release; else why it may not be stepped on."""
        content = self.content
        if content is None:
            return Fault.PLAIN
        if content.grad() is not grad:
            return Fault.REPLACED
        if content.dirty is not None:
            resolve([content])
        if content.fault is not None:
            return content.fault
        return Fault.VOID if content.epoch != LEDGER.epoch else content

    def settle(self) -> None:
        """Makes sure that what has come is held: it is, unless it comes by way of other ranks (shard_watch.py)."""

    @property
    def lost(self) -> bool:
        """Whether clipped sums are on their way still, behind the backward: as `settle`."""
        return False

    def drop(self) -> None:
        """Forgets the sums that are held."""
        self.held = None

    def forget(self) -> None:
        """Drops all receipts; the parameter stays watched."""
        self.pending, self.arriving, self.content = None, Fault.PLAIN, None
        self.drop()


def resolve(contents: Iterable[Content]) -> None:
    """Settles what was in p.grad before each release was added: nothing but zeros, or a fault. One sync per device."""
    by_device: dict[torch.device, list[Content]] = {}
    for content in contents:
        if content.dirty is not None:
            by_device.setdefault(content.dirty.device, []).append(content)
    for group in by_device.values():
        flags = torch.stack([content.dirty for content in group if content.dirty is not None]).tolist()
        for content, dirty in zip(group, flags, strict=True):
            earlier, content.earlier, content.dirty = content.earlier, None, None
            if not dirty or content.fault is not None:
                continue
            content.fault = Fault.STALE if earlier is None else earlier.fault or Fault.ACCUMULATED
            content.causes = () if earlier is None else earlier.causes


def find(parameter: Tensor) -> Watch | None:
    """The watch of a parameter, if it has one."""
    hooks = parameter._backward_hooks
    if hooks:
        for hook in hooks.values():
            if isinstance(hook, Watch):
                return hook
    return None


def watch(parameter: Tensor, name: str | None = None) -> Watch | None:
    """Makes sure that `parameter` is watched; None when it cannot have a gradient (frozen, or not a leaf)."""
    found = find(parameter)
    if found is None:
        if not (parameter.requires_grad and parameter.is_leaf):
            return None
        found = Watch(name)
        found.install(parameter)
    elif name is not None and found.name is None:
        found.name = name
    return found
