"""Follows the clipped sums of a sharded parameter: from a compiled backward, through the reduction over all ranks that
fully_shard makes of them, to this rank's shard of the sum, which is held until its noise is added.

What a part of the model computes with is the whole parameter, and what an optimizer steps on is the shard. The watch of
the former sees that a gradient is one release and nothing else, the watch of the latter takes what has become of it.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from flashdp_compile.compat import first_element, hidden_from_dynamo, local_shard
from flashdp_compile.runtime.release import Release
from flashdp_compile.runtime.watch import Content, Fault, Watch, find


class Expected(NamedTuple):
    """A release on its way, by the watch of the whole parameter."""

    whole: Watch
    release: Release
    fault: Fault | None


class ShardWatch(Watch):
    """The watch of a parameter that an optimizer steps on, of which this rank has a part."""

    __slots__ = ("expected", "arrived", "first", "_parameter")

    def __init__(self, parameter: Tensor, name: str | None, first: int) -> None:
        super().__init__(name)
        self._parameter = weakref.ref(parameter)
        self.first = first
        """How many elements of the parameter lie before this rank's."""
        self.expected: Expected | None = None
        self.arrived: tuple[Tensor, Release, Fault | None] | None = None

    def expect(self, parameter: Tensor, whole: Watch, release: Release, fault: Fault | None) -> None:
        """Called by the compiled node, which hands a gradient of the whole `parameter` to autograd."""
        self.settle()
        if len(parameter._post_accumulate_grad_hooks or ()) > 1:  # fully_shard has none
            fault = fault or Fault.MIXED
        fault = fault or self._clear()
        if self.expected is not None:  # an earlier one has not come
            fault = fault or Fault.LOST
        self.expected = Expected(whole, release, fault)

    def _clear(self) -> Fault | None:
        """Makes room for a sum, which fully_shard adds to what it finds in p.grad: what is wrong with that, unless an
        earlier step has left it there or it is zero."""
        parameter = self._parameter()
        assert parameter is not None
        self._surround(parameter)
        grad, parameter.grad = parameter.grad, None
        if grad is None or isinstance(found := self.judge(grad), Content) and found.stepped:
            return None
        return Fault.STALE if local_shard(grad).any() else None

    def settle(self) -> None:
        """Adds what has come to what is held: only now, behind the backward, as it may have been copied meanwhile."""
        if self.arrived is not None:
            (total, release, fault), self.arrived = self.arrived, None
            self.hold(total, release, fault)

    @property
    def lost(self) -> bool:
        return self.expected is not None

    @hidden_from_dynamo
    def accumulated(self, parameter: Tensor) -> None:
        """Called by fully_shard, when it has put the shard of a sum over all ranks into p.grad."""
        expected, self.expected = self.expected, None
        if expected is None or parameter.grad is None:
            super().accumulated(parameter)
            return
        content = expected.whole.content
        fault = expected.fault
        if content is None or content.release is not expected.release:
            fault = fault or Fault.MIXED
        elif content.dirty is not None:  # what an earlier backward has left there
            fault = fault or Fault.STALE
        else:
            fault = fault or content.fault
        if self.arrived is not None:  # a second one within the same backward
            self.settle()
            fault = fault or Fault.MIXED
        self.arrived = local_shard(parameter.grad), expected.release, fault
        parameter.grad = None

    def drop(self) -> None:
        super().drop()
        self.expected, self.arrived = None, None


def watch_shard(parameter: Tensor, name: str) -> ShardWatch:
    """Watches a sharded parameter, if nobody does. ValueError for shards that noise is not known for."""
    found = find(parameter)
    if isinstance(found, ShardWatch):
        return found
    if found is not None:
        raise ValueError(f"{name} has been trained as it was before it was sharded")
    watched = ShardWatch(parameter, name, first_element(parameter))
    watched.install(parameter)
    return watched
