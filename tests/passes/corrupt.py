"""Tools to break a rewritten graph by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pass_support import Rewritten, rewritten
from torch import fx, nn

from flashdp_compile.errors import InternalError
from flashdp_compile.passes.guarantee import Guarantee
from flashdp_compile.passes.mechanism import Mechanism

aten, flashdp = torch.ops.aten, torch.ops.flashdp
NOISY = Mechanism(noise_multiplier=1.0, clip_fn="hard", mean=False, expected_batch_size=None, seed=3)


def graph(strategy: str = "gram", clipping: str = "per_layer", mechanism: Mechanism = NOISY) -> Rewritten:
    """Two linear layers; the first one's input has a gradient of its own, which is kept."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
    x = torch.randn(3, 4, 6, requires_grad=True)
    return rewritten(model, x, strategy=strategy, clipping=clipping, mechanism=mechanism)


def fails(found: Rewritten, words: str) -> None:
    with pytest.raises(InternalError, match=words) as caught:
        found.verify()
    assert "failed its own verification" in str(caught.value) and "othing was released" in str(caught.value)


def stated(found: Rewritten, **changes: object) -> Guarantee:
    """The guarantee of a graph for another mechanism."""
    mechanism = dataclasses.replace(found.guarantee.mechanism, **changes)
    return dataclasses.replace(found.guarantee, mechanism=mechanism)


def before_noise(found: Rewritten, name: str) -> fx.Node:
    return found.result(name).args[0]


def up_from(node: fx.Node, target) -> fx.Node:
    """The nearest node above that calls `target`."""
    queue = [node]
    while queue:
        node = queue.pop(0)
        if node.target is target:
            return node
        queue.extend(node.all_input_nodes)
    raise AssertionError(f"no {target}")


def weights_of(found: Rewritten, name: str) -> fx.Node:
    return up_from(before_noise(found, name), flashdp.clip_factors.default)


def terms(found: Rewritten, name: str) -> list[fx.Node]:
    """The squared norms that the weights of a parameter's group are made of."""
    queue, result = [weights_of(found, name).args[0]], []
    while queue:
        node = queue.pop()
        if node.target is aten.add.Tensor:
            queue.extend(node.args)
        else:
            result.append(node)
    return result


def insert(found: Rewritten, at: fx.Node, target, *args, **kwargs) -> fx.Node:
    """A new node in front of `at`, with a fake value."""
    with found.joint.graph.inserting_before(at):
        node = found.joint.graph.call_function(target, args, kwargs)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    mode = next(
        n.meta["val"].fake_mode for n in found.joint.graph.nodes if n.op == "placeholder" and _is_tensor(n.meta["val"])
    )
    with mode:
        node.meta["val"] = target(*values, **kwargs)
    return node


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def replace_arg(node: fx.Node, index: int, value: object) -> None:
    """Lets a node be called with another argument."""
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def change_norm(found: Rewritten, name: str, target, *rest) -> None:
    """Puts an op between the norms of a parameter's group and its weights."""
    weights = weights_of(found, name)
    replace_arg(weights, 0, insert(found, weights, target, weights.args[0], *rest))


def sort(graph: fx.Graph) -> None:
    """Every node behind its operands."""
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand not in order:
                visit(operand)
        order[node] = None

    for node in graph.nodes:
        if node not in order:
            visit(node)
    output = graph.output_node()
    for node in order:
        if node is not output:
            output.prepend(node)
    graph.lint()
