"""Reads the squared norms behind clip weights off the graph: which shares were measured, and how often.

Only sums of norms are understood, so nothing can scale, shift or drop one. An op that a new strategy measures with gets
a line in `_NORMS`, and reports the slack of its strategy.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flashdp_compile.kernels.guard import SLACK, gamma
from flashdp_compile.passes.strategies.embedding import EMBEDDING, TIED
from flashdp_compile.passes.strategies.linear import GRAM, OUTER, STORE
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.passes.values import plain
from flashdp_compile.passes.verify.clipped import WIDE, NotProved, Reader, Share, arguments, share_of

aten, flashdp = torch.ops.aten, torch.ops.flashdp


def squared_norms(reader: Reader, node: fx.Node) -> Counter[Share]:
    """How often the squared norm of each share is in a sum of squared norms [B]."""
    found: Counter[Share] = Counter()
    queue = [node]
    while queue:
        term = queue.pop()
        if reader.single:
            term, _ = reader.values.layout(term)
        if term.target is aten.add.Tensor and not term.kwargs:
            queue.extend(term.args)
            continue
        read = _NORMS.get(term.target)
        if read is None:
            raise NotProved(f"{term} ({term.target}) is no squared norm")
        found.update(read(reader, term))
    return found


def _gram_sqnorm(reader: Reader, node: fx.Node) -> list[Share]:
    x, gs, biases = arguments(node, 3)
    if any(biases):
        raise NotProved(f"{node} holds the norm of a bias, which no clipped sum is known to have")
    reader.rounded(GRAM.slack)
    return [share_of(reader.part("product", x, g)) for g in gs]


def _outer_sqnorm(reader: Reader, node: fx.Node) -> list[Share]:
    reader.rounded(OUTER.slack)
    return [share_of(reader.part("product", *arguments(node, 2)))]


def _embedding_sqnorm(reader: Reader, node: fx.Node) -> list[Share]:
    reader.rounded(EMBEDDING.slack)
    return [share_of(reader.part("rows", *arguments(node, 2)))]


def _stored_sqnorm(reader: Reader, node: fx.Node) -> list[Share]:
    """The second result of outer_store is the squared norm of the first."""
    store, index = node.args
    if store.target is not flashdp.outer_store.default or index != 1:
        raise NotProved(f"{node} is no squared norm")
    reader.rounded(STORE.slack)
    products = [n for n in store.users if n.target is operator.getitem and n.args[1] == 0]
    if not products:
        raise NotProved(f"{node} is the norm of a product that nobody reads")
    return [share_of(reader.part("tensor", products[0]))]


def _squares(reader: Reader, node: fx.Node) -> list[Share]:
    """v^2 summed over all that one sample owns; nothing to sum if it owns one number."""
    squares, dims = node, []
    if node.target is not aten.pow.Tensor_Scalar and node.target is not aten.mul.Tensor:
        squares, *given = arguments(node, 1 if node.target is aten.sum.default else 2)
        dims = list(given[0]) if given else list(range(len(plain(squares))))
    root, layout = reader.values.layout(squares)
    owned = [d for d in range(len(layout)) if d != 0 or reader.single]
    if sorted(d % len(layout) for d in dims) != owned or (not reader.single and layout[:1] != plain(root)[:1]):
        raise NotProved(f"{node} does not sum over all that one sample owns")
    if root.target is aten.pow.Tensor_Scalar and arguments(root, 2)[1] == 2:
        value = root.args[0]
    elif root.target is aten.mul.Tensor and arguments(root, 2)[0] is root.args[1]:
        value = root.args[0]
    else:
        raise NotProved(f"{root} ({root.target}) is no square")
    if value.meta["val"].dtype not in WIDE:
        raise NotProved(f"{value} is squared in {value.meta['val'].dtype}")
    reader.rounded(MATERIALIZE.slack)
    return [share_of(reader.part("tensor", value))]


def _sketched(reader: Reader, node: fx.Node) -> list[Share]:
    """An estimate of the sum of the squared norms of several products, from probes of each."""
    x, gs, key, streams, probes = arguments(node, 5)
    if len(streams) != len(gs):
        raise NotProved(f"{node} has {len(streams)} streams of probes for {len(gs)} products")
    reader.estimated(node, key, streams, probes)
    reader.rounded(SLACK)
    return [share_of(reader.part("product", x, g)) for g in gs]


def _tied_sketch(reader: Reader, node: fx.Node) -> list[Share]:
    ids, ge, x, gl, key, stream, probes = arguments(node, 7)
    reader.estimated(node, key, [stream], probes)
    reader.rounded(SLACK)
    return [share_of(reader.part("rows", ids, ge), reader.part("product", gl, x))]


def _hutchpp(reader: Reader, node: fx.Node) -> list[Share]:
    x, g, key, streams, probes = arguments(node, 5)
    if len(streams) != 2:
        raise NotProved(f"{node} has {len(streams)} streams of probes, not one for its basis and one for the rest")
    reader.estimated(node, key, streams, probes)
    reader.rounded(SLACK)
    return [share_of(reader.part("product", x, g))]


def _guarded(reader: Reader, node: fx.Node) -> list[Share]:
    """max(est, what rounding may have hidden) with est = |e|^2 + |l|^2 + 2 <e, l> of an embedding e and a product l."""
    estimate, bound = arguments(node, 2)
    if not _guards(bound, estimate):
        raise NotProved(f"{node} is no guard against rounding")
    crosses = [n for n in estimate.all_input_nodes if n.target is aten.mul.Tensor]
    if estimate.target is not aten.add.Tensor or len(crosses) != 1 or arguments(crosses[0], 2)[1] != 2:
        raise NotProved(f"{estimate} is no squared norm of a sum")
    own, cross = arguments(estimate, 2) if estimate.args[1] is crosses[0] else estimate.args[::-1]
    cross = cross.args[0]
    if cross.target is flashdp.stored_cross.default:
        ids, ge, stored = arguments(cross, 3)
        product = reader.part("tensor", stored)
    elif cross.target is flashdp.tied_cross.default:
        ids, ge, x, gl = arguments(cross, 4)
        product = reader.part("product", gl, x)
    else:
        raise NotProved(f"{cross} ({cross.target}) is no inner product of an embedding and a product")
    rows = reader.part("rows", ids, ge)
    if squared_norms(reader, own) != Counter([share_of(rows), share_of(product)]):
        raise NotProved(f"{estimate} adds the cross term of one sum to the norms of another")
    reader.rounded(TIED.slack)
    return [share_of(rows, product)]


def _guards(bound: Any, estimate: fx.Node) -> bool:
    """Whether a node is (est + gamma R^2) / (1 + SLACK)^2, whatever R; see kernels/guard.py."""
    if bound.target is not aten.div.Tensor or not math.isclose(bound.args[1], (1 + TIED.slack) ** 2, rel_tol=1e-12):
        return False
    raised = bound.args[0]
    if raised.target is not aten.add.Tensor or raised.args[0] is not estimate or raised.kwargs:
        return False
    error = raised.args[1]
    least = gamma(estimate.meta["val"].dtype, 1)
    squared = error.target is aten.mul.Tensor and error.args[0].target is aten.pow.Tensor_Scalar
    return squared and error.args[0].args[1] == 2 and error.args[1] >= least


_NORMS: dict[Any, Callable[[Reader, fx.Node], list[Share]]] = {
    flashdp.gram_sqnorm.default: _gram_sqnorm,
    flashdp.outer_sqnorm.default: _outer_sqnorm,
    flashdp.embedding_sqnorm.default: _embedding_sqnorm,
    flashdp.sketch_sqnorm.default: _sketched,
    flashdp.tied_sketch_sqnorm.default: _tied_sketch,
    flashdp.hutchpp_sqnorm.default: _hutchpp,
    operator.getitem: _stored_sqnorm,
    aten.sum.dim_IntList: _squares,
    aten.sum.default: _squares,
    aten.pow.Tensor_Scalar: _squares,
    aten.mul.Tensor: _squares,
    aten.maximum.default: _guarded,
}
