"""Clip weights that do not come from the norms of what they clip: the verifier recomputes nothing, and sees it."""

import pytest
import torch
from corrupt import (
    NOISY,
    aten,
    before_noise,
    change_norm,
    fails,
    flashdp,
    graph,
    insert,
    replace_arg,
    up_from,
    weights_of,
)
from pass_support import Rewritten, guarantee, rewritten
from small_models import Conv1D, Tied, convolution, twice
from torch import fx, nn

from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.before import Before
from flashdp_compile.passes.plan import Plan
from flashdp_compile.passes.rewrite import rewrite_empty, rewrite_single
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.passes.values import Values
from flashdp_compile.testing import joint_graph
from zoo import Model

STRATEGIES = ["gram", "outer", "store", "materialize"]


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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("left_out", range(4))
def test_a_norm_is_left_out(strategy, left_out):
    found = graph(strategy, "flat")
    term = terms(found, "2.bias")[left_out]
    (user,) = term.users
    (other,) = [n for n in user.args if n is not term]
    user.replace_all_uses_with(other)
    fails(found, "come from other norms than those of its gradients: missing")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_norm_is_counted_twice(strategy):
    found = graph(strategy, "flat")
    change_norm(found, "2.bias", aten.add.Tensor, terms(found, "2.bias")[0])
    fails(found, "come from other norms than those of its gradients: .*in excess")


def test_a_norm_in_the_place_of_another():
    found = graph("materialize", "flat")
    first, second, *_ = terms(found, "2.bias")
    (user,) = first.users
    user.replace_input_with(first, second)
    fails(found, "come from other norms")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_groups_share_one_norm(strategy):
    found = graph(strategy)
    replace_arg(weights_of(found, "0.bias"), 0, weights_of(found, "2.bias").args[0])
    fails(found, "weights of group 0 come from other norms")


@pytest.mark.parametrize(
    "target, rest",
    [
        (aten.mul.Tensor, (0.5,)),
        (aten.div.Tensor, (4.0,)),
        (aten.sub.Tensor, (1.0,)),
        (aten.clamp_max.default, (1.0,)),
        (aten.sqrt.default, ()),
        (aten.pow.Tensor_Scalar, (2,)),
        (aten.pow.Tensor_Scalar, (0.5,)),
        (aten.neg.default, ()),
        (aten.detach.default, ()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_norm_is_changed(target, rest, clipping):
    """A detach changes nothing, but the rewrite writes none."""
    found = graph("gram", clipping)
    change_norm(found, "2.bias", target, *rest)
    fails(found, "weights of group .* (do not come from its|come from other) norms")


def test_norms_in_another_order():
    found = graph("gram")
    change_norm(found, "2.bias", aten.flip.default, [0])
    fails(found, "reverses the batch")


def test_the_mean_of_the_norms():
    found = graph("gram")
    weights = weights_of(found, "2.bias")
    mean = insert(found, weights, aten.sum.dim_IntList, weights.args[0], [0], True)
    replace_arg(weights, 0, insert(found, weights, aten.expand.default, mean, [3]))
    fails(found, "samples are independent|do not come from its norms")


@pytest.mark.parametrize("exponent", [1, 3])
def test_another_power(exponent):
    found = graph("materialize")
    replace_arg(up_from(weights_of(found, "2.bias"), aten.pow.Tensor_Scalar), 1, exponent)
    fails(found, "is no square")


def test_only_some_elements_are_summed():
    found = rewritten(Model(lambda m, x: x * m.scale, scale=nn.Parameter(torch.randn(6))), torch.randn(3, 4, 6))
    total = up_from(found.result("scale"), flashdp.clip_factors.default).args[0]
    squares = up_from(total, aten.pow.Tensor_Scalar)
    some = insert(found, total, aten.slice.Tensor, squares, 1, 0, 3)
    total.replace_input_with(squares, some)
    fails(found, "is no square")


def test_the_square_of_a_sum():
    """The squares must be taken first."""
    found = graph("materialize")
    values = up_from(before_noise(found, "2.bias"), aten.mul.Tensor).args[0]
    (squares,) = [n for n in values.users if n.target is aten.pow.Tensor_Scalar]
    (total,) = squares.users
    plain = insert(found, total, aten.sum.dim_IntList, values, [1])
    total.replace_all_uses_with(insert(found, total, aten.pow.Tensor_Scalar, plain, 2))
    fails(found, "weights of group 2 come from other norms")


@pytest.mark.parametrize("strategy", ["gram", "outer"])
@pytest.mark.parametrize("operand", [0, 1])
def test_the_norm_of_a_wrong_point(strategy, operand):
    """One factor of the product that is measured is another than that of the product that is summed."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    found = rewritten(model, torch.randn(3, 4, 6), strategy=strategy, mechanism=NOISY)
    norms = [n for n in found.joint.graph.nodes if n.target is getattr(flashdp, f"{strategy}_sqnorm").default]
    first, last = norms
    replace_arg(last, operand, first.args[operand])
    fails(found, "come from other norms")


def test_the_norm_of_other_ids():
    found = rewritten(nn.Embedding(11, 6), torch.randint(0, 2, (3, 4)), strategy="gram", mechanism=NOISY)
    norm = up_from(weights_of(found, "weight"), flashdp.embedding_sqnorm.default)
    replace_arg(norm, 0, insert(found, norm, aten.add.Tensor, norm.args[0], 1))
    fails(found, "come from other norms")


def test_the_norm_of_half_of_a_product():
    found = graph("outer")
    norm = up_from(weights_of(found, "2.weight"), flashdp.outer_sqnorm.default)
    replace_arg(norm, 1, insert(found, norm, aten.mul.Tensor, norm.args[1], 0.5))
    fails(found, "come from other norms")


def test_a_stored_product_is_scaled_behind_its_norm():
    found = graph("store")
    total = up_from(before_noise(found, "2.weight"), flashdp.product_sum.default)
    replace_arg(total, 0, insert(found, total, aten.mul.Tensor, total.args[0], 2.0))
    fails(found, "come from other norms")


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

    @staticmethod
    def model() -> Rewritten:
        return rewritten(Tied(), torch.randint(0, 2, (3, 4)), strategy="gram", mechanism=NOISY)

    def guard(self, found: Rewritten) -> fx.Node:
        return up_from(weights_of(found, "tokens.weight"), aten.maximum.default)

    def test_what_the_rewrite_makes_passes(self):
        self.model().verify()

    def test_no_cross_term(self):
        found = self.model()
        estimate = self.guard(found).args[0]
        estimate.replace_all_uses_with(estimate.args[0])
        fails(found, "weights of group all")

    def test_the_cross_term_once(self):
        found = self.model()
        replace_arg(up_from(self.guard(found).args[0], aten.mul.Tensor), 1, 1)
        fails(found, "is no squared norm of a sum")

    def test_the_cross_term_of_others(self):
        found = self.model()
        cross = up_from(self.guard(found), flashdp.tied_cross.default)
        replace_arg(cross, 1, insert(found, cross, aten.mul.Tensor, cross.args[1], 0.5))
        fails(found, "cross term of one sum to the norms of another")

    def test_no_guard(self):
        found = self.model()
        guard = self.guard(found)
        guard.replace_all_uses_with(guard.args[0])
        fails(found, "weights of group all")

    @pytest.mark.parametrize("factor", [0.0, 1e-9])
    def test_a_guard_that_is_too_weak(self, factor):
        found = self.model()
        error = self.guard(found).args[1].args[0].args[1]
        replace_arg(error, 1, factor)
        fails(found, "is no guard against rounding")

    def test_a_guard_of_too_much_slack(self):
        found = self.model()
        replace_arg(self.guard(found).args[1], 1, 4.0)
        fails(found, "is no guard against rounding")

    def test_the_norms_of_both_for_their_sum(self):
        found = self.model()
        guard = self.guard(found)
        guard.replace_all_uses_with(guard.args[0].args[0])
        fails(found, "come from other norms")

    def test_one_use_is_neither_measured_nor_summed(self):
        """Bounded, but not the gradient."""
        found = self.model()
        both = up_from(before_noise(found, "tokens.weight"), aten.add.Tensor)
        both.replace_all_uses_with(both.args[0])
        guard = self.guard(found)
        guard.replace_all_uses_with(up_from(guard, flashdp.embedding_sqnorm.default))
        fails(found, "a part of the gradient of tokens.weight is missing")

    def test_the_head_the_other_way_round(self):
        """A square table: its transposed gradient would fit."""
        model = Tied()
        model.tokens = nn.Embedding(6, 6)
        found = rewritten(model, torch.randint(0, 2, (3, 4)), strategy="gram", mechanism=NOISY)
        found.verify()
        both = up_from(before_noise(found, "tokens.weight"), aten.add.Tensor)
        replace_arg(both, 1, insert(found, both, aten.permute.default, both.args[1], [1, 0]))
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


class TestValues:
    """Equal numbers, equal values."""

    @staticmethod
    def graph() -> tuple[fx.Graph, fx.Node]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.arange(24.0).reshape(12, 2)
        return graph, x

    def chains(self) -> tuple[fx.Graph, list[fx.Node]]:
        graph, x = self.graph()
        ends = []
        for first in (None, [1, 0]):
            for shape in ([3, 4, 2], [4, 3, 2], [2, 3, 4], [2, 4, 3], [6, 2, 2], [2, -1], [-1, 2], [12, 2], [24]):
                for last in (None, [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 1, 0]):
                    node = x if first is None else graph.call_function(aten.permute.default, (x, first))
                    node = graph.call_function(aten.reshape.default, (node, shape))
                    if last is not None and len(shape) == 3:
                        node = graph.call_function(aten.permute.default, (node, last))
                    if len(shape) == 3:
                        ends.append(graph.call_function(aten.unsqueeze.default, (node, 1)))
                    ends.append(node)
        graph.output(tuple(ends))
        for node in graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))
        return graph, ends

    def test_views_are_seen_through_and_never_mistaken(self):
        graph, ends = self.chains()
        values = Values(graph)
        seen_through = 0
        for a in ends:
            for b in ends:
                equal = a.meta["val"].shape == b.meta["val"].shape and torch.equal(a.meta["val"], b.meta["val"])
                if values[a] == values[b]:
                    assert equal, f"{a} and {b} are not the same"
                seen_through += equal and a is not b and values[a] == values[b]
        assert seen_through > 100

    def test_a_transposed_view_equals_a_view_of_the_transposed(self):
        graph, x = self.graph()
        flat = graph.call_function(aten.permute.default, (x, [1, 0]))
        parts = graph.call_function(aten.view.default, (flat, [2, 3, 4]))
        left = graph.call_function(aten.permute.default, (parts, [1, 2, 0]))
        right = graph.call_function(aten.view.default, (x, [3, 4, 2]))
        other = graph.call_function(aten.permute.default, (parts, [2, 1, 0]))
        values = Values(graph)
        assert values[left] == values[right] != values[other]

    def test_what_differs_by_call_stays_apart(self):
        graph, x = self.graph()
        pairs = {
            op: [graph.call_function(op, (x, *rest)) for _ in range(2)]
            for op, rest in {
                aten.tanh.default: (),
                aten.native_dropout.default: (0.5, True),
                aten.rand_like.default: (),
                aten.mul_.Tensor: (2.0,),
                flashdp.draw_key.default: (3,),
            }.items()
        }
        values = Values(graph)
        assert {op for op, (a, b) in pairs.items() if values[a] == values[b]} == {aten.tanh.default}

    def test_numbers_of_other_types_stay_apart(self):
        graph, x = self.graph()
        nodes = [graph.call_function(aten.mul.Tensor, (x, factor)) for factor in (1, 1.0, True, 2)]
        values = Values(graph)
        assert len({values[n] for n in nodes}) == 4


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("build, shape", [(twice, (3, 6)), (convolution, (3, 2, 5, 5))])
def test_what_the_rewrite_makes_passes(build, shape, strategy):
    found = rewritten(build(), torch.randn(*shape), strategy=strategy, mechanism=NOISY)
    assert propagate(found.joint)
    found.verify()
