"""Rewritten graphs that are broken by hand: the verifier names what is wrong."""

import dataclasses

import pytest
import torch
from corrupt import NOISY, aten, before_noise, fails, flashdp, graph, insert, replace_arg, sort, up_from, weights_of
from pass_support import SILENT, Rewritten, rewritten
from small_models import Block
from torch import nn

from flashdp_compile.passes.groups import Group
from flashdp_compile.passes.rewrite import Mechanism


@pytest.mark.parametrize("strategy", ["gram", "outer", "store", "materialize"])
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


class TestNoise:
    @pytest.mark.parametrize("factor", [0.0, 0.5, 1 / 2**0.5, 2.0])
    def test_another_deviation(self, factor):
        """1 / sqrt(2) is what one of two groups would need, if it were alone."""
        found = graph()
        noise = found.result("2.weight")
        replace_arg(noise, 3, noise.args[3] * factor)
        fails(found, "noise of 2.weight has the deviation")

    def test_the_slack_is_left_out(self):
        found = graph()
        for gradient in found.gradients:
            replace_arg(found.result(gradient.name), 3, 1.0)
        fails(found, "has the deviation 1.0")

    def test_slack_is_stated_too_low(self):
        """Statement and graph agree, but on less than the kernels may be off by."""
        found = graph()
        stated = dataclasses.replace(found.guarantee, slack=2.0**-16)
        for gradient in found.gradients:
            replace_arg(found.result(gradient.name), 3, stated.deviation)
        fails(dataclasses.replace(found, guarantee=stated), "norms may be off by")

    def test_a_divisor_is_left_out(self):
        found = graph(mechanism=Mechanism(1.0, "hard", True, 64, 3))
        noise = found.result("2.weight")
        replace_arg(noise, 3, noise.args[3] / 64)
        fails(found, "noise of 2.weight has the deviation")

    def test_a_release_is_scaled(self):
        found = graph()
        noise = found.result("2.weight")
        found.put(found.position("2.weight"), insert(found, found.joint.output, aten.mul.Tensor, noise, 0.5))
        fails(found, "2.weight leaves the graph without noise")

    def test_a_sum_is_added_behind_the_noise(self):
        found = graph()
        noise = found.result("2.weight")
        both = insert(found, found.joint.output, aten.add.Tensor, noise, noise.args[0])
        found.put(found.position("2.weight"), both)
        fails(found, "2.weight leaves the graph without noise")

    def test_noise_is_subtracted_again(self):
        found = graph()
        noise = found.result("2.weight")
        plain = insert(found, found.joint.output, aten.sub.Tensor, noise, noise.args[0])
        replace_arg(noise, 0, insert(found, noise, aten.clone.default, noise.args[0]))
        both = insert(found, found.joint.output, aten.sub.Tensor, noise, plain)
        found.put(found.position("2.weight"), both)
        fails(found, "2.weight leaves the graph without noise")

    def test_one_release_for_two_parameters(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        found = rewritten(model, torch.randn(3, 6), mechanism=NOISY)
        found.put(found.position("0.weight"), found.result("2.weight"))
        fails(found, "would get the noise of another parameter")

    def test_keys_of_two_draws(self):
        """With one draw for each gradient, equal streams would hide behind different keys."""
        found = graph()
        noise = found.result("2.weight")
        replace_arg(noise, 1, insert(found, noise, flashdp.draw_key.default, noise.args[0], 3))
        fails(found, "not drawn from the one key")

    def test_a_key_of_the_forward_pass(self):
        """Two backward passes of one forward would get the same noise."""
        found = graph()
        replace_arg(found.result("2.weight").args[1], 0, next(iter(found.joint.samples)))
        fails(found, "not drawn from the one key")

    @pytest.mark.parametrize("stream", [2**32, -1, 0.5])
    def test_a_stream_that_meets_another(self, stream):
        found = graph()
        replace_arg(found.result("2.weight"), 2, stream)
        fails(found, "noise of 2.weight has the stream")

    def test_another_seed(self):
        found = graph()
        replace_arg(found.result("2.weight").args[1], 1, 4)
        fails(found, "not drawn from the one key")

    def test_noise_that_belongs_to_nothing(self):
        found = graph()
        noise = found.result("2.weight")
        insert(found, found.joint.output, flashdp.add_noise.default, noise.args[0], noise.args[1], 99, 1.0)
        fails(found, "noise that belongs to no gradient")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_sum_is_rounded_before_its_noise(self, dtype):
        found = graph()
        noise = found.result("2.weight")
        narrow = insert(found, noise, torch.ops.prims.convert_element_type.default, noise.args[0], dtype)
        replace_arg(noise, 0, insert(found, noise, torch.ops.prims.convert_element_type.default, narrow, torch.float32))
        fails(found, "2.weight is not a clipped sum")

    def test_noise_where_none_is_stated(self):
        found = graph()
        fails(
            dataclasses.replace(found, guarantee=dataclasses.replace(found.guarantee, noise_multiplier=0.0)),
            "is not a clipped sum|noise that belongs",
        )


class TestOutputs:
    def test_a_sum_leaves_as_one_output_more(self):
        found = graph()
        results = found.joint.output.args[0]
        found.joint.output.args = ((*results, before_noise(found, "2.weight")),)
        fails(found, "number of outputs")

    def test_a_sum_is_written_into_an_input(self):
        found = graph()
        into = next(n for n, i in found.joint.parameters.items() if i.name == "2.weight")
        total = insert(found, found.joint.output, aten.view.default, before_noise(found, "2.weight"), [5, 6])
        insert(found, found.joint.output, aten.copy_.default, into, total)
        fails(found, "may do more than return a value")

    def test_a_node_of_the_model_is_changed(self):
        found = graph()
        tanh = next(n for n in found.joint.graph.nodes if n.target is aten.tanh.default)
        tanh.target = aten.sigmoid.default
        fails(found, "a node of the model, was changed")

    def test_two_gradients_of_one_group_change_places(self):
        """Noised, clipped, and of the right shape."""
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        found = rewritten(model, torch.randn(3, 6), strategy="gram", mechanism=NOISY)
        first, second = found.result("0.weight"), found.result("2.weight")
        found.put(found.position("0.weight"), second)
        found.put(found.position("2.weight"), first)
        fails(found, "which its plain gradient is not")

    def test_a_gradient_that_no_group_holds(self):
        found = graph()
        groups = (*found.guarantee.groups[:1], Group("2", found.guarantee.groups[1].bound, ("2.weight",)))
        fails(
            dataclasses.replace(found, guarantee=dataclasses.replace(found.guarantee, groups=groups)),
            "the groups hold",
        )

    def test_other_groups_than_stated(self):
        """The bounds of both groups together are as stated, the groups are not."""
        found = graph(clipping="flat")
        stated = graph(clipping="per_layer").guarantee
        found.verify()
        fails(dataclasses.replace(found, guarantee=stated), "weights of group")


def of_unknown_batch(strategy: str = "gram") -> Rewritten:
    """The size of the batch divides the sum and is known at run time only."""
    x = torch.randn(4, 2, 6)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    mechanism = dataclasses.replace(NOISY, mean=True)
    return rewritten(Block(), x, strategy=strategy, mechanism=mechanism, dynamic=True)


class TestDivisorAtRunTime:
    @pytest.mark.parametrize("strategy", ["gram", "outer", "store", "materialize"])
    def test_what_the_rewrite_makes_passes(self, strategy):
        of_unknown_batch(strategy).verify()

    def test_no_division(self):
        found = of_unknown_batch()
        found.put(found.position("up.weight"), found.result("up.weight").args[0])
        fails(found, "up.weight is not divided by the size of the batch")

    def test_no_multiplication(self):
        """The sum would be divided twice, its noise once: too much noise. The other way round is the next test."""
        found = of_unknown_batch()
        noise = found.result("up.weight").args[0]
        replace_arg(noise, 0, noise.args[0].args[0])
        fails(found, "up.weight is not divided by the size of the batch")

    def test_noise_is_not_divided(self):
        found = of_unknown_batch()
        scaled = found.result("up.weight")
        noise = scaled.args[0]
        total = noise.args[0].args[0]
        replace_arg(noise, 0, total)
        found.put(found.position("up.weight"), noise)
        fails(found, "up.weight is not divided by the size of the batch")

    def test_by_something_else(self):
        found = of_unknown_batch()
        replace_arg(found.result("up.weight"), 1, 2)
        fails(found, "up.weight is not divided by the size of the batch")


def test_without_noise_a_clipped_sum_leaves_as_it_is():
    found = graph(mechanism=SILENT)
    found.verify()
    replace_arg(weights_of(found, "2.bias"), 1, 1000.0)
    fails(found, "bound")
