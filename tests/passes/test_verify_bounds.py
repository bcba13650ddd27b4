"""Bounds that move, in a rewritten graph: each group by its own scale, of this backward, and the norms counted."""

import dataclasses

import pytest
import torch
from corrupt import NOISY, fails, graph, insert, replace_arg, stated, weights_of

from flashdp_compile.passes.groups import BoundsPlace
from flashdp_compile.runtime.bounds import BoundScales

aten, flashdp = torch.ops.aten, torch.ops.flashdp
STATE = BoundScales()
STATE.kinds = [{"0": 1.0, "2": 1.0}] * 2  # as many as the graph's
MOVING = dataclasses.replace(NOISY, bounds=BoundsPlace(STATE.place, ("2", "0"), 1))  # another order than the graph's


def the(found, op):
    (node,) = found.joint.graph.find_nodes(op="call_function", target=op.default)
    return node


@pytest.mark.parametrize(
    "mechanism", [MOVING, dataclasses.replace(MOVING, mean=True), dataclasses.replace(MOVING, noise_multiplier=0.0)]
)
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_graph_with_moving_bounds_passes(clipping, mechanism):
    if clipping == "flat":
        mechanism = dataclasses.replace(mechanism, bounds=BoundsPlace(STATE.place, ("all",)))
    found = graph(clipping=clipping, mechanism=mechanism)
    found.verify()
    assert the(found, flashdp.bound_scales).args[1] == STATE.place


def test_the_scale_of_another_group():
    found = graph(mechanism=MOVING)
    one, other = weights_of(found, "0.weight"), weights_of(found, "2.weight")
    one.args = (*one.args[:-1], other.args[-1])
    fails(found, "weights of group 0 undo")


def test_weights_that_leave_the_scale_out():
    found = graph(mechanism=MOVING)
    weights = weights_of(found, "2.weight")
    weights.args = weights.args[:-1]
    fails(found, "weights of group 2 undo")


def test_a_scale_that_was_changed():
    found = graph(mechanism=MOVING)
    weights = weights_of(found, "2.weight")
    replace_arg(weights, len(weights.args) - 1, insert(found, weights, aten.mul.Tensor, weights.args[-1], 2.0))
    fails(found, "weights of group 2 undo")


def test_the_scales_of_another_run():
    found = graph(mechanism=MOVING)
    other = BoundScales()
    other.kinds = STATE.kinds
    replace_arg(the(found, flashdp.bound_scales), 1, other.place)
    fails(found, "those of another run")


@pytest.mark.parametrize(
    ("op", "words"),
    [(flashdp.bound_scales, "those of another run or part"), (flashdp.count_within, "not counted by the norms")],
)
def test_scales_of_another_kind_of_part(op, words):
    """One with as many groups, under other names."""
    found = graph(mechanism=MOVING)
    node = the(found, op)
    replace_arg(node, len(node.args) - 1, 0)
    fails(found, words)


def test_scales_of_the_forward():
    found = graph(mechanism=MOVING)
    scales = the(found, flashdp.bound_scales)
    replace_arg(scales, 0, next(n for n in found.joint.graph.nodes if n.op == "placeholder"))
    fails(found, "or of an earlier backward")


@pytest.mark.parametrize("change", ["one missing", "order", "another", "mean"])
def test_a_count_of_other_norms(change):
    found = graph(mechanism=MOVING)
    counted = the(found, flashdp.count_within)
    first, second = counted.args[1]
    if change == "another":
        second = insert(found, counted, aten.mul.Tensor, second, 2.0)
    if change == "mean":
        replace_arg(counted, 2, not counted.args[2])
    else:
        replace_arg(counted, 1, {"one missing": [first], "order": [second, first]}.get(change, [first, second]))
    fails(found, "not counted by the norms of which weights are made")


def test_scales_that_nobody_asked_for():
    found = graph(mechanism=MOVING)
    fails(
        dataclasses.replace(found, guarantee=stated(found, bounds=None)),
        "weights of group 0 undo the scale|bounds are moved by",
    )


def test_no_scales_where_they_were_asked_for():
    found = graph()
    fails(dataclasses.replace(found, guarantee=stated(found, bounds=MOVING.bounds)), "bounds are moved by")
