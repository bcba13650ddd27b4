"""Norms and clipped sums of small gradients, of all layers, in a few launches.

A model has hundreds of biases and scales of norms, each of which would be measured and summed by launches of its own.
Their per-sample gradients v [B, n] are small, so they can wait for each other:

    clip_factors(sum(v^2, [1]) + sum(u^2, [1]) + ...)                   clip_factors(vector_sqnorms([v, u]) + ...)
    add_noise(sum(where(w != 0, v * w, 0), [0]), key, stream, std)      one of the results of vector_sums

Runs behind the proof. The noise is exactly what add_noise would draw, that of (key, stream), so streams stay apart as
proved; norms and sums differ by rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from flashdp_compile.compat import argument, sort_topologically
from flashdp_compile.passes.late.norms import erase, is_small, rows, squared, terms, viewed
from flashdp_compile.passes.nodes import call, is_zero

aten, flashdp = torch.ops.aten, torch.ops.flashdp

AT_ONCE = 64  # vectors that one launch sums: a kernel for hundreds takes long to compile


def norm_vectors(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the norms on devices of this type, in place; returns how many."""
    done = 0
    for total, reader in _added_norms(graph):
        parts = [(n, squared(n)) for n in terms(total)]
        vectors = [v for _, v in parts if v is not None and v.meta["val"].device.type == device]
        if len(vectors) < 2:
            continue
        with graph.inserting_before(reader):
            added = [n for n, v in parts if v is None or v.meta["val"].device.type != device]
            values = [call(graph, aten.reshape.default, v, rows(v)) for v in vectors]
            for first in range(0, len(values), AT_ONCE):
                added.append(call(graph, flashdp.vector_sqnorms.default, values[first : first + AT_ONCE]))
            rest, *more = added
            for term in more:
                rest = call(graph, aten.add.Tensor, rest, term)
        total.replace_all_uses_with(rest)
        erase(total)
        done += len(vectors)
    sort_topologically(graph)  # a norm may now come behind what reads it
    return done


def _added_norms(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Norms of several members of a clipping group, and who clips by them."""
    for clip in graph.find_nodes(op="call_function", target=flashdp.clip_factors.default):
        yield clip.args[0], clip
    for layer in graph.find_nodes(op="call_function", target=flashdp.clipped_product.default):
        if (beside := argument(layer, "beside")) is not None:
            yield beside, layer


class Vector(NamedTuple):
    """sum_b w_b v_b, reshaped, with noise: what `noise` gives. v is [B, *shape], w is [B]."""

    noise: fx.Node
    values: fx.Node
    weights: fx.Node


def sum_vectors(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the sums on devices of this type, in place; returns how many."""
    vectors = [v for n in graph.find_nodes(op="call_function", target=flashdp.add_noise.default) if (v := _read(n))]
    vectors = [v for v in vectors if v.values.meta["val"].device.type == device]
    groups: dict[Any, list[Vector]] = {}
    for vector in vectors:
        _, key, _, std = vector.noise.args
        groups.setdefault((key, std), []).append(vector)
    for (key, std), group in groups.items():
        for first in range(0, len(group), AT_ONCE):
            _together(graph, key, std, group[first : first + AT_ONCE])
    sort_topologically(graph)  # a sum may now come behind what reads it
    return len(vectors)


def _read(noise: fx.Node) -> Vector | None:
    total = viewed(noise.args[0])
    if total.target is not aten.sum.dim_IntList or len(total.args) != 2 or total.kwargs or list(total.args[1]) != [0]:
        return None
    kept = total.args[0]
    if kept.target is not aten.where.self:
        return None
    nonzero, weighted, otherwise = kept.args
    if nonzero.target is not aten.ne.Scalar or nonzero.args[1] != 0 or not is_zero(otherwise):
        return None
    weights = viewed(nonzero.args[0])
    factors = weighted.all_input_nodes if weighted.target is aten.mul.Tensor else []
    values = [n for n in factors if viewed(n) is not weights]
    if len(factors) != 2 or len(values) != 1 or not is_small(values[0].meta["val"], weights.meta["val"]):
        return None
    by = next(n for n in factors if n is not values[0])
    along_samples = (*values[0].meta["val"].shape[:1], *[1] * (values[0].meta["val"].dim() - 1))
    if not all(tuple(n.meta["val"].shape) == along_samples for n in (by, nonzero)):
        return None
    return Vector(noise, values[0], weights)


def _together(graph: fx.Graph, key: fx.Node, std: float, vectors: list[Vector]) -> None:
    with graph.inserting_before(vectors[-1].noise):
        values = [call(graph, aten.reshape.default, v.values, rows(v.values)) for v in vectors]
        weights, streams = [v.weights for v in vectors], [v.noise.args[2] for v in vectors]
        sums = call(graph, flashdp.vector_sums.default, values, weights, key, streams, std)
        for number, vector in enumerate(vectors):
            one = call(graph, operator.getitem, sums, number)
            shaped = call(graph, aten.reshape.default, one, list(vector.noise.meta["val"].shape))
            vector.noise.replace_all_uses_with(shaped)
    for vector in vectors:
        erase(vector.noise)
