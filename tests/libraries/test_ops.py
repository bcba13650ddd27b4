"""The page of ops is what the models' graphs hold, and every op on it has the rule that it says."""

import pytest
import torch

from libraries import MODELS, ops

THE_PAGES_OWN = pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the page is of torch 2.13")


@THE_PAGES_OWN
def test_every_op_has_the_rule_that_the_page_says():
    listed = ops.listed()
    assert len(listed) > 60
    assert {op: ops.rule_of(op) for op in listed} == listed


@THE_PAGES_OWN
@pytest.mark.parametrize("name", ["gpt2", "clip_vision"])
def test_the_ops_of_a_model_are_on_the_page(name):
    MODELS[name].need()
    assert set(ops.ops_of(name)) <= set(ops.listed())


def test_an_op_without_a_rule_says_so():
    assert ops.rule_of("aten.bincount.default").startswith("none")
    assert ops.rule_of("aten.mm.default") == "rules_matmul.mm"
