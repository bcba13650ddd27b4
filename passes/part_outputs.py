"""What a part of a model hands to the next one: its samples must lie where those of inputs are looked for.

The next part takes that dimension for the batch. If it were that of tokens, or of samples and tokens in one, each token
would be clipped there by itself, and a sample would add as much as all of its tokens together. Sizes do not tell: a
batch may have as many samples as each has tokens.
"""

from __future__ import annotations

import torch
from torch import fx

from flashdp_compile.errors import Refusal
from flashdp_compile.passes.axes.domain import Batched, Constant, same
from flashdp_compile.passes.axes.engine import Axes
from flashdp_compile.passes.batch_axis import BatchDim
from flashdp_compile.passes.capture import JointGraph
from flashdp_compile.passes.order import dependents
from flashdp_compile.passes.refuse import refuse

_FIX = (
    "return one row for each sample, along the dimension in which they come (batch_dim), and rearrange inside of the "
    "part that reads it"
)


def check_part_outputs(joint: JointGraph, batch_dim: BatchDim, axes: Axes | None) -> None:
    """Raises Refusal for an output that another part would misread. One number, a loss, cannot be handed on.

    `axes` is None for a batch of one sample or none.
    """
    if not isinstance(batch_dim, int):
        raise Refusal(
            "batch_dim is one for each input by name, but what parts of a model hand to each other has no names: give "
            "one number, and let all inputs have their samples there"
        )
    of_samples = {*joint.samples, *dependents(joint.samples)}
    for node in of_samples:
        if node.target is torch.ops.aten._local_scalar_dense.default:
            refuse(
                node,
                joint,
                "a part of the model makes a number of Python of samples, which others would take for public",
                "leave it a tensor, with a row for each sample, and capture_scalar_outputs off",
            )
    for node in joint.outputs:
        value = node.meta.get("val")
        dims = getattr(value, "dim", lambda: 0)()
        if dims == 0:
            continue
        dim = batch_dim % dims if -dims <= batch_dim < dims else None
        if axes is None:
            if node in of_samples and (dim is None or not same(value.shape[dim], joint.batch)):
                refuse(
                    node, joint, f"this output of a part of the model has other rows than samples ({_told(node)})", _FIX
                )
            continue
        state = axes[node]
        if (
            isinstance(state, Constant)
            or dim is not None
            and isinstance(state, Batched)
            and state.aligned(Batched(dim))
        ):
            continue
        refuse(node, joint, f"this output of a part of the model holds its samples otherwise ({state})", _FIX)


def _told(node: fx.Node) -> str:
    return "x".join(map(str, node.meta["val"].shape))
