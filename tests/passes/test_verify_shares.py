"""Weights of a part of a model, broken by hand: they are by the norms over its shares of the bound."""

import dataclasses

from corrupt import NOISY, fails, flashdp, graph, insert, replace_arg, stated

from flashdp_compile.runtime.part_runs import PartRuns

RUNS = PartRuns(shared=True)
OWED = dataclasses.replace(NOISY, noise_multiplier=0.0, owed=True, part_runs=RUNS.place)


def of_part():
    return graph(clipping="flat", mechanism=OWED)


def the(found):
    (node,) = found.joint.graph.find_nodes(op="call_function", target=flashdp.share_bound.default)
    return node


def clip(found):
    (node,) = found.joint.graph.find_nodes(op="call_function", target=flashdp.clip_factors.default)
    return node


def test_it_is_accepted():
    found = of_part()
    found.verify()
    assert clip(found).args[0] is the(found) and the(found).args[1] == RUNS.place


def test_without_shares():
    found = of_part()
    replace_arg(clip(found), 0, the(found).args[0])
    fails(found, "are not those of its samples' shares of the bound")


def test_shares_that_nothing_states():
    found = of_part()
    fails(dataclasses.replace(found, guarantee=stated(found, part_runs=None)), "do not come from its norms")


def test_shares_of_another_model():
    found = of_part()
    replace_arg(the(found), 1, PartRuns(shared=True).place)
    fails(found, "have the shares of another model")


def test_shares_twice():
    found = of_part()
    replace_arg(clip(found), 0, insert(found, clip(found), flashdp.share_bound.default, the(found), RUNS.place))
    fails(found, "are not those of its samples' shares of the bound")


def test_norms_of_part_of_the_gradients():
    found = of_part()
    first, _ = the(found).args[0].args
    replace_arg(the(found), 0, first)
    fails(found, "come from other norms than those of its gradients")


def test_several_groups():
    """Their norms would be one another's."""
    found = graph(clipping="per_layer", mechanism=OWED)
    fails(found, "are not those of its samples' shares of the bound")
