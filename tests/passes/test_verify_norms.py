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
    terms,
    up_from,
    weights_of,
)
from pass_support import rewritten
from torch import nn

from flashdp_compile.passes.strategies.catalogue import NAMES
from zoo import Model

STRATEGIES = NAMES


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
