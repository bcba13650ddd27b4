"""The scale of a loss in a rewritten graph: undone by the weights, put back behind the noise, of this backward."""

import dataclasses

import pytest
import torch
from corrupt import NOISY, fails, graph, insert, replace_arg, stated, weights_of

aten, flashdp = torch.ops.aten, torch.ops.flashdp
SCALED = dataclasses.replace(NOISY, grad_scaler=2)
OVER_BATCH = dataclasses.replace(SCALED, mean=True, seed=None)


def scale_of(found):
    (scale,) = found.joint.graph.find_nodes(op="call_function", target=flashdp.grad_scale.default)
    return scale


@pytest.mark.parametrize("mechanism", [SCALED, OVER_BATCH, dataclasses.replace(SCALED, noise_multiplier=0.0)])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_scaled_graph_passes(clipping, mechanism):
    found = graph(clipping=clipping, mechanism=mechanism)
    found.verify()
    assert scale_of(found).args[1] == 2


def test_a_release_that_is_not_scaled():
    found = graph(mechanism=SCALED)
    found.put(found.position("2.weight"), found.result("2.weight").args[0])
    fails(found, "gradient of 2.weight is not scaled as its loss was")


def test_a_release_that_is_scaled_twice():
    found = graph(mechanism=SCALED)
    twice = insert(found, found.joint.output, aten.mul.Tensor, found.result("2.weight"), scale_of(found))
    found.put(found.position("2.weight"), twice)
    fails(found, "2.weight leaves the graph without noise")


def test_a_scale_in_front_of_the_noise():
    found = graph(mechanism=SCALED)
    noise = found.result("2.weight").args[0]
    replace_arg(noise, 0, insert(found, noise, aten.mul.Tensor, noise.args[0], scale_of(found)))
    fails(found, "2.weight is not a clipped sum")


def test_weights_that_leave_the_scale_in():
    found = graph(mechanism=SCALED)
    weights = weights_of(found, "2.weight")
    weights.args = weights.args[:-1]
    fails(found, "undo the scale")


def test_another_scaler():
    found = graph(mechanism=SCALED)
    replace_arg(scale_of(found), 1, 3)
    fails(found, "another scaler, or by an old scale")


def test_a_scale_of_the_forward():
    found = graph(mechanism=SCALED)
    scale = scale_of(found)
    replace_arg(scale, 0, next(n for n in found.joint.graph.nodes if n.op == "placeholder"))
    fails(found, "another scaler, or by an old scale")


def test_two_scales():
    found = graph(mechanism=SCALED)
    scale = scale_of(found)
    insert(found, found.joint.output, flashdp.grad_scale.default, *scale.args)
    fails(found, "which is not what the options say")


def test_a_scale_that_nobody_asked_for():
    found = graph(mechanism=SCALED)
    fails(dataclasses.replace(found, guarantee=stated(found, grad_scaler=None)), "is scaled by")


def test_no_scale_where_one_was_asked_for():
    found = graph()
    fails(dataclasses.replace(found, guarantee=stated(found, grad_scaler=2)), "which is not what the options say")
