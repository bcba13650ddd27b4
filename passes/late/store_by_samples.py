"""Makes the products of a large layer for a few samples at a time, where those of all of them set the peak of memory.

    product, norms = outer_store(x, g)
    product_sum(product, clip_factors(norms, ...), ...)        clipped_product(x, g, samples, None, ...)

    total = norms + others                                     sum, total = clipped_product(x, g, samples, others, ...)
    product_sum(product, clip_factors(total, ...), ...)        sum
    ... clip_factors(total, ...) ...                           ... clip_factors(total, ...) ...

The head of a language model has B x vocabulary x width products. `release_late` finds them a place where activations
have been freed; under activation checkpointing there is none. A layer that is clipped by itself need not have them all
at once, nor need one whose norms are the last of its clipping group: those of the other members are known before. Of a
group only the largest layer is made so. The sum is read and written once more each time, so as many are taken as
the peak allows.

What is made so may also run as soon as its operands are there, and these, such as the gradient of the logits, are
then no longer held for it. In a group it may have to wait for the norms of others, with its operands instead of its
products: the model of memory says which are less.

The other members read their weights from the call of clip_factors that was there, and it counts what it counted. It
reads the norms by which the layer was clipped: all members have the weights of the same numbers.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from flashdp_compile.compat import argument, sort_topologically
from flashdp_compile.passes.late.memory import Memory
from flashdp_compile.passes.late.norms import erase, terms
from flashdp_compile.passes.nodes import call, is_static
from flashdp_compile.passes.order import Step, dependents

aten, flashdp = torch.ops.aten, torch.ops.flashdp

LARGE = 0.02  # of the peak: smaller products stay together
GAIN = 0.01  # of the peak, at least
GAIN_IN_GROUP = 0.05  # and where a group waits: the sum of a block of Llama 7B took a fifth longer for 0.3 GiB of 54


class Layer(NamedTuple):
    """One from the products of all samples to their sum, whose weights come from `group`: the layer's norms and those
    of the other members (`beside`), added up."""

    store: fx.Node
    product: fx.Node
    norms: fx.Node
    beside: tuple[fx.Node, ...]
    group: fx.Node
    clip: fx.Node
    total: fx.Node

    @property
    def made(self) -> tuple[fx.Node, ...]:
        """What is made at once."""
        weights = (self.clip,) if len(self.clip.users) == 1 else ()
        return self.store, self.product, self.norms, *weights, self.total

    @property
    def operands(self) -> set[fx.Node]:
        scale = argument(self.clip, "grad_scale")
        read = {*self.store.all_input_nodes, *self.total.all_input_nodes, *self.beside}
        return (read | ({scale} if scale is not None else set())) - {self.product, self.clip}


class Parts(NamedTuple):
    """A layer made behind `place`, so many samples at a time: the order of all nodes then, and its peak."""

    place: fx.Node
    samples: int
    order: list[Step]
    peak: int


def store_by_samples(graph: fx.Graph, device: str = "cuda", beside: int = 0) -> int:
    """Rewrites layers on devices of this type, in place; returns how many. `beside`: bytes that are kept there besides
    the values of this graph, by which a peak is judged too: those of a sharded model's other parts."""
    stores = graph.find_nodes(op="call_function", target=flashdp.outer_store.default)
    layers = [found for store in stores if (found := _read(store, device)) is not None]
    if not layers:
        return 0
    memory, order, chosen = Memory(graph), list[Step](graph.nodes), list[tuple[Layer, fx.Node, int]]()
    groups = set[fx.Node]()
    peak = beside + memory.peak(order)
    for layer in sorted(layers, key=lambda layer: -memory.bytes[layer.product]):
        if memory.bytes[layer.product] < LARGE * peak:
            break
        if layer.clip in groups:  # its norms are what a larger layer of the group would wait for
            continue
        groups.add(layer.clip)
        whole = memory.bytes[layer.product]
        tried = [_tried(memory, order, layer, place) for place in (_earliest(order, layer), layer.total)]
        best = min(tried, key=lambda way: way.peak)
        if beside + best.peak <= (1 - (GAIN_IN_GROUP if layer.beside else GAIN)) * peak:
            chosen.append((layer, best.place, best.samples))
            order, peak = best.order, beside + best.peak
            memory.bytes[layer.product] = whole // _batch(layer) * best.samples
        else:
            memory.bytes[layer.product] = whole
    for layer, place, samples in chosen:  # behind the loop: the memory knows the nodes that were there before
        _replace(graph, layer, place, samples)
    sort_topologically(graph)
    return len(chosen)


def _read(store: fx.Node, device: str) -> Layer | None:
    """The layer of these products, unless its weights need more than norms that are known without it."""
    x = store.args[0].meta["val"]
    if x.device.type != device or not all(map(is_static, store.meta["val"])) or x.shape[0] < 2:
        return None
    made = {n.args[1]: n for n in store.users if n.target is operator.getitem}
    if len(made) != 2 or len(store.users) != 2 or len(made[0].users) != 1:
        return None
    product, norms = made[0], made[1]
    (total,) = product.users
    if total.target is not flashdp.product_sum.default or total.args[0] is not product:
        return None
    clip = argument(total, "weights")
    if clip.target is not flashdp.clip_factors.default:
        return None
    if len(clip.users) == 1 and argument(clip, "counts"):  # weights that nobody reads would not be counted, either
        return None
    group = clip.args[0]
    beside = terms(group)
    if norms not in beside or (norms is not group and len(norms.users) != 1):
        return None
    beside.remove(norms)
    layer = Layer(store, product, norms, tuple(beside), group, clip, total)
    alike = all(_kind(n) == _kind(norms) for n in beside)
    return layer if alike and layer.operands.isdisjoint(dependents([store])) else None


def _kind(norms: fx.Node) -> tuple[torch.Size, torch.dtype]:
    return norms.meta["val"].shape, norms.meta["val"].dtype


def _earliest(order: list[Step], layer: Layer) -> fx.Node:
    """The node behind which all operands of a layer are there."""
    needed = layer.operands
    return next(n for n in reversed(_nodes(order)) if n in needed or n.op == "placeholder")


def _nodes(order: list[Step]) -> list[fx.Node]:
    return [node for step in order for node in (step if isinstance(step, tuple) else (step,))]


def _as_one(order: list[Step], layer: Layer, place: fx.Node) -> list[Step]:
    """The order in which the layer is made at once, behind a node or in the place of its sum. What reads it, as the
    other members of its group do, comes behind."""
    made, readers = layer.made, dependents([layer.store])
    moved, waiting = list[Step](), list[Step]()
    at = next(at for at, step in enumerate(order) if step is place or (isinstance(step, tuple) and place in step))
    for step in order[: at + 1]:
        if step not in made:
            (waiting if _reads(step, readers) else moved).append(step)
    return [*moved, made, *waiting, *(step for step in order[at + 1 :] if step not in made)]


def _reads(step: Step, readers: set[fx.Node]) -> bool:
    return any(node in readers for node in (step if isinstance(step, tuple) else (step,)))


def _tried(memory: Memory, order: list[Step], layer: Layer, place: fx.Node) -> Parts:
    """With how many samples at a time the peak is the lowest or almost that. Their products alone are counted."""
    as_one, peaks = _as_one(order, layer, place), dict[int, int]()
    each = layer.product.meta["val"].nbytes // _batch(layer)
    for samples in sorted({max(1, _batch(layer) // 2**n) for n in range(1, _batch(layer).bit_length())}):
        memory.bytes[layer.product] = samples * each
        peaks[samples] = memory.peak(as_one)
    enough = max(n for n, p in peaks.items() if p <= (1 + GAIN) * min(peaks.values()))
    return Parts(place, enough, as_one, peaks[enough])


def _batch(layer: Layer) -> int:
    return int(layer.product.meta["val"].shape[0])


def _replace(graph: fx.Graph, layer: Layer, place: fx.Node, samples: int) -> None:
    policy = [argument(layer.clip, n) for n in ("bound", "fn", "mean", "expected_batch_size", "grad_scale")]
    noise = [argument(layer.total, n) for n in ("key", "stream", "std")]
    with graph.inserting_before(place.next):
        beside = None
        for norms in layer.beside:
            beside = norms if beside is None else call(graph, aten.add.Tensor, beside, norms)
        operands = *layer.store.args, samples, beside
        made = call(graph, flashdp.clipped_product.default, *operands, *policy, *noise)
        total, group = (call(graph, operator.getitem, made, at) for at in (0, 1))
    layer.total.replace_all_uses_with(total)
    layer.group.replace_all_uses_with(group)
    for old in (layer.total, layer.group):
        erase(old)
