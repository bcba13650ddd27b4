"""Shared inputs, tied tables, and batches of one sample or none: each with norms of its own kind to break."""

import pytest
import torch
from corrupt import NOISY, aten, before_noise, fails, flashdp, insert, replace_arg, terms, up_from, weights_of
from pass_support import Rewritten, guarantee, rewritten
from small_models import Conv1D, Tied, convolution, twice
from torch import fx, nn

from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.before import Before
from flashdp_compile.passes.plan import Plan
from flashdp_compile.passes.rewrite import rewrite_empty, rewrite_single
from flashdp_compile.passes.strategies.catalogue import NAMES
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.testing import joint_graph
from zoo import Model

STRATEGIES = NAMES


class TestSharedInputs:
    """q, k, v: one kernel for the norms of three layers."""

    @staticmethod
    def model() -> Rewritten:
        layers = {name: nn.Linear(6, 6, bias=False) for name in "qkv"}
        found = rewritten(
            Model(lambda m, x: m.q(x) * m.k(x) + m.v(x), **layers),
            torch.randn(3, 4, 6),
            strategy="gram",
            mechanism=NOISY,
        )
        assert len(terms(found, "q.weight")) == 1 and len(found.plan.shared["all"]) == 1
        return found

    def test_what_the_rewrite_makes_passes(self):
        self.model().verify()

    def test_one_layer_is_left_out(self):
        found = self.model()
        (norm,) = terms(found, "q.weight")
        norm.args = (norm.args[0], norm.args[1][:2], norm.args[2][:2])
        fails(found, "come from other norms than those of its gradients: missing")

    def test_one_layer_is_taken_twice(self):
        found = self.model()
        (norm,) = terms(found, "q.weight")
        replace_arg(norm, 1, [norm.args[1][0], *norm.args[1][:2]])
        fails(found, "come from other norms")

    def test_a_bias_is_in_the_norm(self):
        found = self.model()
        (norm,) = terms(found, "q.weight")
        replace_arg(norm, 2, [True, False, False])
        fails(found, "holds the norm of a bias")

    def test_layers_that_hold_their_weights_both_ways(self):
        """nn.Linear and GPT-2's Conv1D read the input as different sides of their products."""
        model = Model(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(6, 5), b=Conv1D(6, 5))
        found = rewritten(model, torch.randn(3, 4, 6), strategy="gram", mechanism=NOISY)
        assert found.plan.shared["all"]
        found.verify()


class TestTied:
    """|e + l|^2 = |e|^2 + |l|^2 + 2 <e, l>."""

    @pytest.fixture(params=["gram", "store"])
    def found(self, request) -> Rewritten:
        return rewritten(Tied(), torch.randint(0, 2, (3, 4)), strategy=request.param, mechanism=NOISY)

    def cross(self, found: Rewritten) -> fx.Node:
        double = up_from(self.guard(found).args[0], aten.mul.Tensor)
        return double.args[0]

    def guard(self, found: Rewritten) -> fx.Node:
        return up_from(weights_of(found, "tokens.weight"), aten.maximum.default)

    def test_what_the_rewrite_makes_passes(self, found):
        found.verify()

    def test_no_cross_term(self, found):
        estimate = self.guard(found).args[0]
        estimate.replace_all_uses_with(estimate.args[0])
        fails(found, "weights of group all")

    def test_the_cross_term_once(self, found):
        replace_arg(up_from(self.guard(found).args[0], aten.mul.Tensor), 1, 1)
        fails(found, "is no squared norm of a sum")

    def test_the_cross_term_of_others(self, found):
        cross = self.cross(found)
        replace_arg(cross, 1, insert(found, cross, aten.mul.Tensor, cross.args[1], 0.5))
        fails(found, "cross term of one sum to the norms of another")

    def test_the_cross_term_of_another_product(self):
        found = rewritten(Tied(), torch.randint(0, 2, (3, 4)), strategy="store", mechanism=NOISY)
        cross = self.cross(found)
        replace_arg(cross, 2, insert(found, cross, aten.mul.Tensor, cross.args[2], 0.5))
        fails(found, "cross term of one sum to the norms of another")

    def test_a_sum_that_is_added_to_every_row(self, found):
        """A table of one row would be broadcast over the product."""
        (lookup,) = found.joint.graph.find_nodes(op="call_function", target=flashdp.embedding_sum.default)
        replace_arg(lookup, 3, 1)
        lookup.meta["val"] = lookup.meta["val"].new_empty((1, lookup.meta["val"].shape[1]))
        fails(found, "adds values of other shapes")

    def test_a_guard_of_another_power(self, found):
        replace_arg(self.guard(found).args[1].args[0].args[1].args[0], 1, 0)
        fails(found, "is no guard against rounding")

    def test_no_guard(self, found):
        guard = self.guard(found)
        guard.replace_all_uses_with(guard.args[0])
        fails(found, "weights of group all")

    @pytest.mark.parametrize("factor", [0.0, 1e-9])
    def test_a_guard_that_is_too_weak(self, found, factor):
        error = self.guard(found).args[1].args[0].args[1]
        replace_arg(error, 1, factor)
        fails(found, "is no guard against rounding")

    def test_a_guard_of_too_much_slack(self, found):
        replace_arg(self.guard(found).args[1], 1, 4.0)
        fails(found, "is no guard against rounding")

    def test_the_norms_of_both_for_their_sum(self, found):
        guard = self.guard(found)
        guard.replace_all_uses_with(guard.args[0].args[0])
        fails(found, "come from other norms")

    def test_one_use_is_neither_measured_nor_summed(self, found):
        """Bounded, but not the gradient."""
        both = up_from(before_noise(found, "tokens.weight"), aten.add.Tensor)
        both.replace_all_uses_with(both.args[0])
        guard = self.guard(found)
        guard.replace_all_uses_with(up_from(guard, flashdp.embedding_sqnorm.default))
        fails(found, "a part of the gradient of tokens.weight is missing")

    @pytest.mark.parametrize("strategy", ["gram", "store"])
    @pytest.mark.parametrize("part", [0, 1])
    def test_a_part_the_other_way_round(self, strategy, part):
        """A square table: its transposed gradient would fit."""
        model = Tied()
        model.tokens = nn.Embedding(6, 6)
        found = rewritten(model, torch.randint(0, 2, (3, 4)), strategy=strategy, mechanism=NOISY)
        found.verify()
        both = up_from(before_noise(found, "tokens.weight"), aten.add.Tensor)
        replace_arg(both, part, insert(found, both, aten.permute.default, both.args[part], [1, 0]))
        fails(found, "come from other norms")


class TestWholeBatches:
    """One sample and none: there is no batch dimension, and the same must hold."""

    @staticmethod
    def model(samples: int) -> Rewritten:
        joint = joint_graph(nn.Linear(6, 5), torch.randn(samples, 6))
        before = Before.of(joint)
        slack = MATERIALIZE.slack if samples else 0.0
        stated = guarantee(before, "flat", 0.5, NOISY, slack)
        (rewrite_single if samples else rewrite_empty)(joint, stated.groups, NOISY)
        gradients = tuple(_Named(g) for g in before.released.values())
        return Rewritten(joint, Plan(stated.groups, {}), before, gradients, stated)

    @pytest.mark.parametrize("samples", [0, 1])
    def test_what_the_rewrite_makes_passes(self, samples):
        assert self.model(samples).verify() is None

    @pytest.mark.parametrize("samples", [0, 1])
    def test_no_noise(self, samples):
        found = self.model(samples)
        found.put(found.position("bias"), before_noise(found, "bias"))
        fails(found, "gradient of bias leaves the graph without noise")

    def test_the_plain_gradient(self):
        found = self.model(1)
        replace_arg(found.result("bias"), 0, found.before.released[found.position("bias")].node)
        fails(found, "gradient of bias is not a clipped sum")

    def test_anything_but_zero(self):
        found = self.model(0)
        noise = found.result("bias")
        replace_arg(noise, 0, insert(found, noise, aten.full.default, [5], 1.0))
        fails(found, "gradient of bias is not zero without samples")

    def test_a_key_of_the_forward_pass(self):
        found = self.model(0)
        noise = found.result("bias")
        replace_arg(noise.args[1], 0, noise.args[0])
        fails(found, "not drawn from the one key")

    def test_a_looser_bound(self):
        found = self.model(1)
        replace_arg(weights_of(found, "bias"), 1, 0.6)
        fails(found, "bound")

    def test_a_norm_is_left_out(self):
        found = self.model(1)
        weights = weights_of(found, "bias")
        replace_arg(weights, 0, weights.args[0].args[0])
        fails(found, "come from other norms than those of its gradients: missing")

    def test_a_norm_of_one_row(self):
        found = self.model(1)
        squares = up_from(weights_of(found, "bias"), aten.sum.default)
        squares.target = aten.sum.dim_IntList
        squares.args = (squares.args[0], [0])
        fails(found, "does not sum over all")

    def test_a_sum_over_what_is_no_batch(self):
        """The norm of the rows is not that of their sum."""
        found = self.model(1)
        kept = up_from(before_noise(found, "weight"), aten.where.self)
        (user,) = kept.users
        user.replace_input_with(kept, insert(found, user, aten.sum.dim_IntList, kept, [0]))
        fails(found, "gradient of weight is not a clipped sum")


class _Named:
    def __init__(self, gradient) -> None:
        self.gradient, self.name = gradient, gradient.name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("build, shape", [(twice, (3, 6)), (convolution, (3, 2, 5, 5))])
def test_what_the_rewrite_makes_passes(build, shape, strategy):
    found = rewritten(build(), torch.randn(*shape), strategy=strategy, mechanism=NOISY)
    assert propagate(found.joint)
    found.verify()
