"""Noise that costs no pass over memory: drawn inside the kernel that makes a sum.

Runs behind the proof, which reads one add_noise for each gradient. The kernel draws exactly the numbers that add_noise
would draw, those of (key, stream), so streams stay apart as proved.
"""

from __future__ import annotations

import torch
from torch import fx

from flashdp_compile.compat import argument
from flashdp_compile.kernels import FAMILIES
from flashdp_compile.passes.nodes import RESHAPES

flashdp = torch.ops.flashdp

# ops whose kernels can draw, if they are given a key
_DRAWING = {family.op.default for family in FAMILIES.values() if family.draws}


def fuse_noise(graph: fx.Graph, device: str = "cuda") -> int:
    """Rewrites the add_noise nodes on devices of this type, in place; returns how many are left."""
    nodes = list(graph.find_nodes(op="call_function", target=flashdp.add_noise.default))
    return sum(n.meta["val"].device.type == device and not _into_sum(n) for n in nodes)


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
