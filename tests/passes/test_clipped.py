"""Reading sums and norms off a graph, without the axes pass, which finds most broken ones first."""

import pytest
import torch
from corrupt import NOISY, aten, before_noise, flashdp, graph, insert, replace_arg, up_from, weights_of
from pass_support import Rewritten, rewritten
from small_models import Tied
from torch import fx, nn

from flashdp_compile.passes.values import Values
from flashdp_compile.passes.verify.clipped import NotProved, Reader
from flashdp_compile.passes.verify.norms import squared_norms

convert = torch.ops.prims.convert_element_type.default


class TestReadingAlone:
    """Most broken sums are found by the axes pass first. What reads them must not count on it."""

    @staticmethod
    def refuses(found: Rewritten, name: str, words: str) -> None:
        with pytest.raises(NotProved, match=words):
            Reader(Values(found.joint.graph), set(), single=False).clipped_sum(before_noise(found, name))

    @staticmethod
    def refuses_norm(found: Rewritten, norm: fx.Node, words: str) -> None:
        with pytest.raises(NotProved, match=words):
            squared_norms(Reader(Values(found.joint.graph), set(), single=False), norm)

    def test_weights_along_another_dimension(self):
        found = rewritten(nn.Linear(3, 3), torch.randn(3, 3), strategy="materialize", mechanism=NOISY)
        where = up_from(before_noise(found, "bias"), aten.where.self)
        flat = weights_of(found, "bias")
        replace_arg(where.args[1], 1, flat)
        self.refuses(found, "bias", "along another dimension")
        row = insert(found, where.args[1], aten.view.default, flat, [1, 3])
        replace_arg(where.args[1], 1, row)
        self.refuses(found, "bias", "no product of values and clip weights")

    def test_a_sum_over_another_dimension(self):
        found = graph("materialize")
        replace_arg(before_noise(found, "2.bias"), 1, [1])
        self.refuses(found, "2.bias", "not over the samples")

    def test_no_sum(self):
        found = graph("materialize")
        replace_arg(found.result("2.bias"), 0, before_noise(found, "2.bias").args[0])
        self.refuses(found, "2.bias", "does not sum over the samples")

    def test_no_weights_and_weights_alone(self):
        found = graph("materialize")
        where = up_from(before_noise(found, "2.bias"), aten.where.self)
        values, weights = where.args[1].args
        replace_arg(where, 1, values)
        self.refuses(found, "2.bias", "no product with clip weights")
        replace_arg(where, 1, insert(found, where, aten.mul.Tensor, weights, weights))
        self.refuses(found, "2.bias", "no product of values and clip weights")

    def test_one_in_the_place_of_samples_of_weight_zero(self):
        found = graph("materialize")
        where = up_from(before_noise(found, "2.bias"), aten.where.self)
        replace_arg(where, 2, insert(found, where, aten.full.default, [], 1.0))
        self.refuses(found, "2.bias", "in the place of samples of weight 0")

    def test_two_weights_in_one_sum(self):
        found = rewritten(Tied(), torch.randint(0, 2, (3, 4)), strategy="gram", mechanism=NOISY)
        weights = weights_of(found, "tokens.weight")
        own = insert(found, weights, flashdp.clip_factors.default, *weights.args)
        replace_arg(up_from(before_noise(found, "tokens.weight"), flashdp.embedding_sum.default), 2, own)
        self.refuses(found, "tokens.weight", "its parts are weighted by")

    def test_products_are_rounded(self):
        found = rewritten(nn.Linear(6, 5).bfloat16(), torch.randn(3, 6).bfloat16(), mechanism=NOISY)
        total = up_from(found.result("bias"), aten.sum.dim_IntList)
        weighed = up_from(total, aten.mul.Tensor)
        (squares,) = [n for n in weighed.args[0].users if n.target is aten.pow.Tensor_Scalar]
        (norm,) = squares.users
        narrow = insert(found, squares, convert, weighed.args[0], torch.bfloat16)
        replace_arg(weighed, 0, narrow)
        with pytest.raises(NotProved, match="would be rounded to torch.bfloat16"):
            Reader(Values(found.joint.graph), set(), single=False).clipped_sum(total)
        replace_arg(squares, 0, narrow)
        self.refuses_norm(found, norm, "is squared in torch.bfloat16")

    def test_what_a_stored_product_is_not(self):
        found = graph("store")
        store = next(n for n in found.joint.graph.nodes if n.target is flashdp.outer_store.default)
        product, norm = sorted(store.users, key=lambda n: n.args[1])
        self.refuses_norm(found, product, "is no squared norm")
        product.replace_all_uses_with(norm)
        found.joint.graph.erase_node(product)
        self.refuses_norm(found, norm, "that nobody reads")
