"""Noise that costs no pass over memory: drawn inside the kernel that makes a sum, or once for all small gradients.

Runs behind the proof, which reads one add_noise for each gradient. What it changes is where the noise is added:

    add_noise(sum(...), key, stream, std)      a sum whose kernel can draw: the same bits, inside
    add_noise(grad, key, stream, std)          any other small gradient: grad + std * (its own of one draw_normals)

Both draw exactly the numbers that add_noise would draw, those of (key, stream), so streams stay apart as proved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import argument
from flashdp_compile.passes.points import RESHAPES

aten, flashdp = torch.ops.aten, torch.ops.flashdp

# ops whose kernels can draw, if they are given a key
_DRAWING = {flashdp.product_sum.default, flashdp.weighted_matmul.default, flashdp.embedding_sum.default}
SMALL = 1 << 20  # elements: a larger gradient is worth a launch of its own
AT_ONCE = 64  # tensors that one launch draws for: a kernel for hundreds takes long to compile


def fuse_noise(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the add_noise nodes on devices of this type, in place; returns how many are left."""
    nodes = list(graph.find_nodes(op="call_function", target=flashdp.add_noise.default))
    left = [n for n in nodes if n.meta["val"].device.type == device and not _into_sum(n)]
    small = [n for n in left if _is_small(n.meta["val"])]
    for key in dict.fromkeys(n.args[1] for n in small):
        of_key = [n for n in small if n.args[1] is key]
        for first in range(0, len(of_key), AT_ONCE):
            _together(graph, key, of_key[first : first + AT_ONCE])
    return len(left) - len(small)


def _into_sum(noise: fx.Node) -> bool:
    """Hands key, stream and std to the op that makes the sum; False if there is none that can draw."""
    grad, key, stream, std = noise.args
    chain = [grad]  # from the gradient up to its sum, through views that keep the order of the elements
    while chain[-1].target in RESHAPES and len(chain[-1].users) == 1:
        chain.append(chain[-1].args[0])
    total = chain[-1]
    if total.target not in _DRAWING or len(total.users) != 1 or total.meta["val"].dtype != torch.float32:
        return False
    if argument(total, "key") is not None:
        return False
    total.kwargs = {**total.kwargs, "key": key, "stream": stream, "std": std}
    for node in reversed(chain):  # the key may be drawn behind the sum
        noise.prepend(node)
    noise.replace_all_uses_with(grad)
    noise.graph.erase_node(noise)
    return True


def _is_small(value: torch.Tensor) -> bool:
    return all(isinstance(s, int) for s in value.shape) and 0 < value.numel() <= SMALL and value.dtype == torch.float32


def _together(graph: fx.Graph, key: fx.Node, noises: list[fx.Node]) -> None:
    """One draw for several gradients, each of which adds its own by ordinary code that Inductor fuses."""
    sizes, streams = [n.meta["val"].numel() for n in noises], [n.args[2] for n in noises]
    with graph.inserting_before(noises[0]):
        drawn = _call(graph, flashdp.draw_normals.default, key, sizes, streams)
    for number, noise in enumerate(noises):
        grad, _, _, std = noise.args
        with graph.inserting_before(noise):
            normals = _call(graph, operator.getitem, drawn, number)
            normals = _call(graph, aten.reshape.default, normals, list(noise.meta["val"].shape))
            noise.replace_all_uses_with(
                _call(graph, aten.add.Tensor, grad, _call(graph, aten.mul.Tensor, normals, std))
            )
        graph.erase_node(noise)


def _call(graph: fx.Graph, op: Callable[..., Any], *args: Any) -> fx.Node:
    node = graph.call_function(op, args)
    node.meta["val"] = op(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node
