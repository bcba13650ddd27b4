"""The per-sample gradient itself, [B, *shape]: exact for every accepted graph, and the reference of all others.

One sample's gradient is the gradient's own subgraph with every operand cut down to that sample's slice. The subgraph
is interpreted under vmap over those slices, so that no op needs a second, per-sample definition.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from flashdp_compile.passes.axes.domain import Batched, Reduced
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.cost import Cost, Kernel, materialize_work
from flashdp_compile.passes.emit import Emitter
from flashdp_compile.passes.nodes import per_dimension
from flashdp_compile.passes.points import ParameterGradient
from flashdp_compile.passes.strategies.base import Prepared, Strategy, split, weigh, widened
from flashdp_compile.passes.strategies.batched_put import index_put

aten, prims = torch.ops.aten, torch.ops.prims


def prepare(emit: Emitter, axes: Axes, gradient: ParameterGradient) -> Prepared:
    """Materialises the per-sample gradient once; the weighted sum reads it again."""
    body, leaves, states = _subgraph(axes, gradient.gradient.node)
    batched = [isinstance(s, Batched) for s in states]
    known = list(zip(leaves, states, batched, strict=True))

    def per_sample(batch: Any, *values: Any) -> Tensor:
        slices = [
            widened(split(v, s, batch)) if isinstance(s, Batched) else widened(v) if isinstance(v, Tensor) else v
            for v, s in zip(values, states, strict=True)
        ]
        constants = {i: v for i, v in enumerate(slices) if not batched[i]}

        def one(*own: Tensor) -> Tensor:
            moving = iter(own)
            environment = {(n, s): next(moving) if b else constants[i] for i, (n, s, b) in enumerate(known)}
            return _interpret(axes, body, environment)

        return torch.vmap(one)(*[v for v, b in zip(slices, batched, strict=True) if b])

    def norms(values: Tensor) -> Tensor:
        return values.square().flatten(1).sum(1) if values.dim() > 1 else values.square()

    def clipped(values: Tensor, weights: Tensor) -> Tensor:
        return weigh(values, weights.to(values.dtype))

    samples = emit.per_sample(per_sample, *leaves)
    return Prepared(
        emit(norms, samples, key=("norms",)), lambda weights: emit(clipped, samples, weights, key=("weigh",))
    )


def _subgraph(axes: Axes, root: fx.Node) -> tuple[list[fx.Node], list[fx.Node], list[Any]]:
    """The nodes between the points and a gradient, in order; what they read; and the axis along which each is read."""
    inside: set[fx.Node] = set()
    queue = [root]
    while queue:
        node = queue.pop()
        if node in inside or not _is_reduced(axes, node):
            continue
        inside.add(node)
        queue.extend(node.all_input_nodes)
    body = [n for n in axes.joint.graph.nodes if n in inside]
    reads = dict.fromkeys((n, axes.seen_by(b, n)) for b in body for n in b.all_input_nodes if n not in inside)
    return body, [n for n, _ in reads], [axis for _, axis in reads]


def _is_reduced(axes: Axes, node: fx.Node) -> bool:
    state = axes.states.get(node)
    return any(isinstance(s, Reduced) for s in (state if isinstance(state, tuple) else (state,)))


def _interpret(axes: Axes, body: list[fx.Node], values: dict[tuple[fx.Node, Any], Any]) -> Tensor:
    """Runs the subgraph on one sample, without rounding in between."""
    inner: dict[fx.Node, Any] = {}
    for node in body:

        def value(n: fx.Node, node: fx.Node = node) -> Any:
            return inner[n] if n in inner else values[n, axes.seen_by(node, n)]

        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        inner[node] = _SPECIAL.get(node.target, _call)(node, *args, **kwargs)
    return inner[body[-1]]


def _call(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("dtype", None)  # sums and products stay in the dtype of accumulation
    return node.target(*args, **kwargs)


def _keep(node: fx.Node, x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x.real if x.is_complex() and not node.meta["val"].is_complex() else x


def _overwrite(node: fx.Node, overwritten: Tensor, source: Tensor, *rest: Any) -> Tensor:
    """Without a rounding; vmap knows no rule for it and would take the samples one by one."""
    return _keep(node, source).expand(overwritten.shape)


def _convolution_backward(node: fx.Node, grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The gradients of weight and bias as a product with the windows that the kernel sees.

    vmap's own rule would fold the samples into `groups`, which must be a number: a dynamic batch size would be fixed.
    """
    _, stride, padding, dilation, transposed, _, groups, mask = rest
    bias = grad.sum([0, *range(2, grad.dim())]) if mask[2] else None
    if transposed:  # grad and x trade places: each element of the input meets a window of the output
        grad, x = x, grad
    size, kernel = grad.shape[2:], weight.shape[2:]
    steps = [per_dimension(s, len(kernel)) for s in (stride, padding, dilation)]
    x = F.pad(x, [p for each in reversed(steps[1]) for p in (each, each)])
    for i, (k, s, d) in enumerate(zip(kernel, steps[0], steps[2], strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d].narrow(2 + i, 0, size[i])
    windows = x.reshape(x.shape[0], groups, x.shape[1] // groups, math.prod(size), math.prod(kernel))
    parts = grad.reshape(grad.shape[0], groups, grad.shape[1] // groups, math.prod(size))
    return None, torch.einsum("ngol,ngilk->goik", parts, windows).reshape(weight.shape), bias


def _masked_index_put(node: fx.Node, table: Tensor, mask: Tensor, indices: list[Any], values: Tensor) -> Tensor:
    """As an ordinary index_put, which vmap knows: what is masked out adds zero to row zero."""
    rank = max(i.dim() for i in indices if i is not None)
    inside = mask.reshape(mask.shape[:rank]) if mask.dim() > rank else mask
    safe = [None if i is None else torch.where(inside, i, torch.zeros_like(i)) for i in indices]
    return index_put(table, safe, torch.where(mask, values, torch.zeros_like(values)), True)


def _embedding_backward(node: fx.Node, grad: Tensor, ids: Tensor, rows: Any, padding: int, scale: bool) -> Tensor:
    table = torch.zeros(rows, grad.shape[-1], dtype=grad.dtype, device=grad.device)
    kept = torch.where((ids != padding).unsqueeze(-1), grad, torch.zeros_like(grad))
    return index_put(table, [ids], kept, True)


def _embedding_bag_backward(
    node: fx.Node,
    grad: Tensor,
    ids: Tensor,
    offsets: Any,
    bag_of_id: Any,
    size: Tensor,
    maxima: Tensor,
    rows: Any,
    scale: bool,
    mode: int,
    sparse: bool,
    weights: Tensor | None = None,
    padding: int = -1,
) -> Tensor:
    """One bag: its gradient [1, d] goes to each id (sum), over their number (mean), or to the maxima's ids."""
    table = torch.zeros(rows, grad.shape[-1], dtype=grad.dtype, device=grad.device)
    if mode == _MAX:
        column = torch.arange(grad.shape[-1], device=grad.device)
        return index_put(table, [maxima[0].clamp_min(0), column], torch.where(size > 0, grad[0], 0.0), True)
    each = grad.expand(ids.shape[0], -1)
    if mode == _MEAN:
        each = each / size.clamp_min(1)
    if weights is not None:
        each = each * weights.unsqueeze(-1)
    return index_put(table, [ids], torch.where((ids != padding).unsqueeze(-1), each, 0.0), True)


_MEAN, _MAX = 1, 2


def _index_put(node: fx.Node, table: Tensor, indices: list[Any], values: Tensor, accumulate: bool = False) -> Tensor:
    return index_put(table, indices, values, accumulate)


def _slice_scatter(
    node: fx.Node, x: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    """vmap's own rule fixes a dynamic batch size, and fails on open ends, steps and bounds that count from the end."""
    first, size = 0 if start is None else start, x.shape[dim]
    if isinstance(first, int) and isinstance(size, int):
        first = slice(first, None).indices(size)[0]
    return _written(x, source, dim, first + step * torch.arange(source.shape[dim], device=x.device))


def _select_scatter(node: fx.Node, x: Tensor, source: Tensor, dim: int, index: Any) -> Tensor:
    """As `_slice_scatter`, of one place."""
    return _written(x, source.unsqueeze(dim), dim, index + torch.arange(1, device=x.device))


def _written(x: Tensor, source: Tensor, dim: int, places: Tensor) -> Tensor:
    return index_put(x, [*[None] * (dim % x.dim()), places], source, False)


def _trilinear(
    node: fx.Node,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    new_a: list[int],
    new_b: list[int],
    new_c: list[int],
    dims: list[int],
    *_: Any,
) -> Tensor:
    factors = []
    for tensor, new in ((a, new_a), (b, new_b), (c, new_c)):
        for dim in sorted(new):
            tensor = tensor.unsqueeze(dim)
        factors.append(tensor)
    return (factors[0] * factors[1] * factors[2]).sum(dims)


def _weight_norm_backward(
    node: fx.Node, grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """w = g v / |v|, the norm over all dimensions but `dim` (Salimans and Kingma 2016, equation 3)."""
    others = [d for d in range(v.dim()) if d != dim]
    along = (grad * v).sum(others, keepdim=True) / norms
    return g / norms * (grad - v * along / norms), along


_SPECIAL: dict[Any, Any] = {
    aten._trilinear.default: _trilinear,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    operator.getitem: lambda node, x, i: x[i],
    prims.rev.default: lambda node, x, dims: x.flip(dims),  # vmap has no rule for it, and would loop over the samples
    prims.convert_element_type.default: _keep,
    aten._to_copy.default: _keep,
    aten.copy.default: _overwrite,
    aten.convolution_backward.default: _convolution_backward,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._embedding_bag_backward.default: _embedding_bag_backward,
}
if hasattr(prims, "fma"):
    _SPECIAL[prims.fma.default] = lambda node, a, b, c: a * b + c
if hasattr(aten, "_unsafe_masked_index_put_accumulate"):
    _SPECIAL[aten._unsafe_masked_index_put_accumulate.default] = _masked_index_put


def cost(gradient: ParameterGradient, axes: Axes) -> Cost:
    """Reads every operand once, multiplies if the points do, writes [B, *shape] and reads it twice."""
    work = materialize_work(gradient, axes)
    flops, moved = work.flops + 3 * work.result, work.bytes + 12 * work.result
    total = Kernel("materialize", work.result, 4 * work.result)
    norm = Kernel("materialize", flops - total.flops, moved - total.moved)
    return Cost(flops, moved, 4 * work.result, (norm, total))


def _try_product(x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    products = widened(x).mT @ widened(g)
    return products.square().sum((1, 2)), (products * weights[:, None, None]).sum(0)


MATERIALIZE = Strategy("materialize", lambda gradient, axes: True, prepare, cost, 2.0**-20, _try_product)
