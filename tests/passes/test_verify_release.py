"""What happens to clipped sums on their way out, broken by hand: noise, divisor, outputs."""

import dataclasses

import pytest
import torch
from corrupt import NOISY, aten, before_noise, fails, flashdp, graph, insert, replace_arg, stated, weights_of
from pass_support import SILENT, Rewritten, rewritten
from small_models import Block
from torch import nn

from flashdp_compile.passes.groups import Group
from flashdp_compile.passes.mechanism import Mechanism
from flashdp_compile.passes.strategies.catalogue import NAMES


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

    @pytest.mark.parametrize("stream", [2**32, -1, 0.5, 2.0])
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

    def test_noise_of_the_parameters_own_precision(self):
        """In bfloat16 the sum is added up and noised in float32, and rounded last."""
        found = rewritten(nn.Linear(6, 5).bfloat16(), torch.randn(3, 6).bfloat16(), strategy="outer", mechanism=NOISY)
        found.verify()
        rounded = found.result("weight")
        noise = rounded.args[0]
        with noise.graph.inserting_before(noise):
            narrow = noise.graph.node_copy(rounded)
        narrow.args = (noise.args[0], torch.bfloat16)
        replace_arg(noise, 0, narrow)
        noise.meta = dict(rounded.meta)
        found.put(found.position("weight"), noise)
        fails(found, "weight was rounded to torch.bfloat16 before its noise")

    def test_a_sum_that_owes_noise_is_rounded(self):
        """It leaves the graph in float32, and only a sum that has its noise may be rounded there."""
        model, x = nn.Linear(6, 5).bfloat16(), torch.randn(3, 6).bfloat16()
        owed = dataclasses.replace(SILENT, owed=True)
        assert rewritten(model, x, mechanism=owed).result("weight").meta["val"].dtype == torch.float32
        found = rewritten(model, x, mechanism=SILENT)
        fails(dataclasses.replace(found, guarantee=stated(found, owed=True)), "was rounded to torch.bfloat16 before")

    def test_noise_where_none_is_stated(self):
        found = graph()
        fails(
            dataclasses.replace(found, guarantee=stated(found, noise_multiplier=0.0)),
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
    @pytest.mark.parametrize("strategy", NAMES)
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
