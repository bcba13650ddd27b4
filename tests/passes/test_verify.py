"""Rewritten graphs that are broken by hand: the verifier names what is wrong."""

import pytest
import torch
from corrupt import NOISY, aten, before_noise, fails, flashdp, graph, insert, replace_arg, sort, up_from, weights_of
from pass_support import rewritten
from torch import nn

from flashdp_compile.passes.strategies.catalogue import NAMES


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_what_the_rewrite_makes_passes(strategy, clipping):
    graph(strategy, clipping).verify()


def test_noise_is_dropped():
    found = graph()
    found.put(found.position("2.weight"), before_noise(found, "2.weight"))
    fails(found, "gradient of 2.weight leaves the graph without noise")


def test_noise_is_shared():
    found = graph()
    noise = found.result("2.weight")
    noise.args = (*noise.args[:2], found.result("0.weight").args[2], *noise.args[3:])
    fails(found, "gradient of (0|2).weight would get the noise of another parameter")


def test_weights_of_another_group():
    found = graph()
    weighted = up_from(before_noise(found, "0.weight"), flashdp.weighted_matmul.default)
    weighted.replace_input_with(weights_of(found, "0.weight"), weights_of(found, "2.weight"))
    fails(found, "gradient of (0|2).weight is weighted by the weights of group")


def test_no_weights_at_all():
    found = graph("materialize")
    total = up_from(before_noise(found, "2.bias"), aten.sum.dim_IntList)
    weighed = up_from(total.args[0], aten.mul.Tensor)
    total.replace_input_with(total.args[0], weighed.args[0])
    fails(found, "gradient of 2.bias is not a clipped sum")


def test_the_plain_product_leaves():
    found = graph("gram")
    weighted = up_from(before_noise(found, "2.weight"), flashdp.weighted_matmul.default)
    x, g = weighted.args[:2]
    left, right = (insert(found, weighted, aten.view.default, v, [12, v.meta["val"].shape[-1]]) for v in (x, g))
    product = insert(
        found, weighted, aten.mm.default, insert(found, weighted, aten.permute.default, left, [1, 0]), right
    )
    weighted.replace_all_uses_with(product)
    fails(found, "gradient of 2.weight is not a clipped sum")


def test_weights_are_used_twice():
    found = graph("materialize")
    weighed = up_from(before_noise(found, "2.bias"), aten.mul.Tensor)
    values, weights = weighed.args
    again = insert(found, weighed, aten.mul.Tensor, values, weights)
    weighed.args = (again, weights)
    fails(found, "gradient of 2.bias is not a clipped sum")


def test_a_sample_gets_the_weight_of_its_neighbour():
    found = graph("materialize")
    weighed = up_from(before_noise(found, "2.bias"), aten.mul.Tensor)
    weighed.args = (insert(found, weighed, aten.flip.default, weighed.args[0], [0]), weighed.args[1])
    fails(found, "reverses the batch")


def test_an_unweighted_sum_is_added():
    found = graph("materialize")
    total = before_noise(found, "2.bias")
    values = up_from(total, aten.mul.Tensor).args[0]
    plain = insert(found, found.result("2.bias"), aten.sum.dim_IntList, values, [0])
    found.result("2.bias").args = (
        insert(found, found.result("2.bias"), aten.add.Tensor, total, plain),
        *found.result("2.bias").args[1:],
    )
    fails(found, "gradient of 2.bias is not a clipped sum")


def test_a_constant_takes_the_place_of_an_excluded_sample():
    found = graph("materialize")
    where = up_from(before_noise(found, "2.bias"), aten.where.self)
    where.args = (where.args[0], where.args[1], insert(found, where, aten.full.default, [], 1.0))
    fails(found, "gradient of 2.bias is not a clipped sum")


def test_a_sum_leaves_as_a_forward_output():
    found = graph()
    found.put(0, before_noise(found, "2.weight"))
    fails(found, "output 0 was replaced")


def test_a_sum_leaves_as_the_gradient_of_an_input():
    found = graph()
    position = max(found.before.kept)
    assert found.joint.output.args[0][position] is not None
    found.put(position, before_noise(found, "2.weight"))
    fails(found, f"output {position} was replaced")


def test_a_sum_was_there_as_the_gradient_of_an_input():
    """The graph was wrong already before the rewrite: what is kept must not be a sum either."""
    found = graph()
    position = max(found.before.kept)
    found.put(position, before_noise(found, "2.weight"))
    found.before.kept[position] = before_noise(found, "2.weight")
    fails(found, "carries a sum over samples that was not clipped")


def test_two_gradients_change_places():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    found = rewritten(model, torch.randn(3, 6), strategy="gram", clipping="per_layer", mechanism=NOISY)
    first, second = found.result("0.bias"), found.result("2.bias")
    found.put(found.position("0.bias"), second)
    found.put(found.position("2.bias"), first)
    fails(found, "is weighted by the weights of group")


def test_two_groups_exchange_their_weights():
    found = graph()
    first, second = weights_of(found, "0.weight"), weights_of(found, "2.weight")
    swap = {first: second, second: first}
    uses = [(n, w) for w in swap for n in list(w.users)]
    for node, weights in uses:
        node.replace_input_with(weights, swap[weights])
    assert {weights_of(found, n) for n in ("0.weight", "0.bias")} == {second}
    sort(found.joint.graph)
    fails(found, "weights of group")


def test_each_member_of_a_group_is_clipped_by_itself():
    found = graph(clipping="flat")
    weights = weights_of(found, "2.bias")
    own = insert(found, weights, flashdp.clip_factors.default, weights.args[0], *weights.args[1:])
    for node in list(weights.users)[:1]:
        node.replace_input_with(weights, own)
    fails(found, "weight")


def test_a_looser_bound():
    found = graph(clipping="flat")
    weights = weights_of(found, "2.bias")
    weights.args = (weights.args[0], 1000.0, *weights.args[2:])
    fails(found, "bound")


def test_a_clipped_sum_is_scaled_up_before_its_noise():
    found = graph()
    noise = found.result("2.weight")
    noise.args = (insert(found, noise, aten.mul.Tensor, noise.args[0], 1000.0), *noise.args[1:])
    fails(found, "2.weight")


def test_noise_without_deviation():
    found = graph()
    noise = found.result("2.weight")
    noise.args = (*noise.args[:3], 0.0)
    fails(found, "2.weight")


def test_noise_of_a_constant_key():
    found = graph()
    noise = found.result("2.weight")
    key = insert(found, noise, aten.full.default, [2], 7)
    noise.args = (noise.args[0], key, *noise.args[2:])
    fails(found, "2.weight")


def test_weights_are_used_twice_by_a_kernel():
    found = graph("gram")
    weighted = up_from(before_noise(found, "2.weight"), flashdp.weighted_matmul.default)
    x, g, weights = weighted.args
    column = insert(found, weighted, aten.view.default, weights, [3, 1, 1])
    weighted.args = (insert(found, weighted, aten.mul.Tensor, x, column), g, weights)
    fails(found, "2.weight")


def test_samples_that_are_not_finite_are_not_left_out():
    """Weight zero times infinity is not a number: the where() in front of the sum is what leaves them out."""
    found = graph("materialize")
    where = up_from(before_noise(found, "2.bias"), aten.where.self)
    where.replace_all_uses_with(up_from(where, aten.mul.Tensor))
    fails(found, "2.bias")


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_weights_are_scaled(factor):
    found = graph("outer")
    weighted = up_from(before_noise(found, "2.weight"), flashdp.weighted_matmul.default)
    replace_arg(weighted, 2, insert(found, weighted, aten.mul.Tensor, weighted.args[2], factor))
    fails(found, "gradient of 2.weight is not a clipped sum")


def test_weights_are_flipped():
    found = graph("outer")
    weighted = up_from(before_noise(found, "2.weight"), flashdp.weighted_matmul.default)
    replace_arg(weighted, 2, insert(found, weighted, aten.flip.default, weighted.args[2], [0]))
    fails(found, "reverses the batch")


def test_weights_are_rolled():
    found = graph("outer")
    weighted = up_from(before_noise(found, "2.weight"), flashdp.weighted_matmul.default)
    replace_arg(weighted, 2, insert(found, weighted, aten.roll.default, weighted.args[2], [1], [0]))
    fails(found, "roll")


def test_weights_lie_along_another_dimension():
    """B = d: the sizes would fit."""
    found = rewritten(nn.Linear(3, 3), torch.randn(3, 3), strategy="materialize", mechanism=NOISY)
    weighed = up_from(before_noise(found, "bias"), aten.mul.Tensor)
    replace_arg(weighed, 1, weights_of(found, "bias"))
    fails(found, "samples are independent|another dimension")


def test_a_sum_over_another_dimension():
    found = rewritten(nn.Linear(3, 3), torch.randn(3, 3), strategy="materialize", mechanism=NOISY)
    replace_arg(up_from(before_noise(found, "bias"), aten.sum.dim_IntList), 1, [1])
    fails(found, "bias|samples are independent")


def test_weights_stand_where_another_condition_should():
    found = graph("materialize")
    where = up_from(before_noise(found, "2.bias"), aten.where.self)
    weighted = where.args[1]
    replace_arg(where, 0, insert(found, where, aten.ne.Scalar, weighted, 0))
    fails(found, "2.bias is not a clipped sum: where.* for another reason")


def test_a_share_depends_on_the_weights_of_another_group():
    """Bounded all the same, but no per-sample gradient."""
    found = graph("materialize")
    weighed = up_from(before_noise(found, "0.bias"), aten.mul.Tensor)
    other = insert(found, weighed, aten.view.default, weights_of(found, "2.bias"), [3, 1])
    values = weighed.args[0]
    users = list(values.users)
    both = insert(found, users[0], aten.mul.Tensor, values, other)
    for user in users:
        user.replace_input_with(values, both)
    sort(found.joint.graph)
    fails(found, "0.bias")


@pytest.mark.parametrize(
    "index, value", [(1, 1.5), (1, 0.5), (2, "normalize"), (2, "automatic"), (3, True), (4, 7)], ids=str
)
def test_another_policy_than_stated(index, value):
    found = graph()
    replace_arg(weights_of(found, "2.bias"), index, value)
    fails(found, "weights of group 2 have the bound and policy")


def test_weights_that_nobody_should_have():
    found = graph()
    weights = weights_of(found, "2.bias")
    insert(found, found.joint.output, flashdp.clip_factors.default, *weights.args)
    fails(found, "belong to no group")
