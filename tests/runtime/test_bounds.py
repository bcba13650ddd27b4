"""The scales of the parts of a model: a section for each, which only its own backward reads and counts in."""

import pytest
import torch

from flashdp_compile.errors import Refusal
from flashdp_compile.runtime.bounds import BoundScales, PartGroup, bound_scales, count_within

MEMBERS = [[torch.zeros(2)] for _ in range(5)]


def scales():
    """Of three parts, two of one class, whose groups come in any order."""
    found, (one, two, three, four, five) = BoundScales(), MEMBERS
    found.divide(
        {
            0: [PartGroup("up", "a.up", 2.0, one), PartGroup("down", "a.down", 2.0, two)],
            1: [PartGroup("(root)", "head", 2.0, three)],
            3: [PartGroup("down", "b.down", 2.0, four), PartGroup("up", "b.up", 2.0, five)],
        }
    )
    found.load([1.0, 2.0, 3.0, 4.0, 5.0])
    found.prepare({"up": 2.0, "down": 2.0}, [[torch.zeros(1)], [torch.zeros(1)]])
    return found


def test_each_part_has_its_own():
    found, anchor = scales(), torch.zeros(())
    assert list(found.groups) == ["a.down", "a.up", "head", "b.down", "b.up"]
    assert found.kinds == [{"down": 2.0, "up": 2.0}, {"(root)": 2.0}]
    assert [found.group_of(one) for (one,) in MEMBERS] == [1, 0, 2, 3, 4]
    for part, kind, own in ((0, 0, [1.0, 2.0]), (1, 1, [3.0]), (3, 0, [4.0, 5.0])):
        found.begin(part)
        assert bound_scales(anchor, found.place, kind).tolist() == own


def test_each_part_counts_for_itself():
    found = scales()
    found.begin(3)
    own = bound_scales(torch.zeros(()), found.place, 0)
    norms = [torch.tensor([7.0, 9.0, 0.0]), torch.tensor([1.0, 9.0, 10.0])]  # the bounds are 8 and 10
    count_within(own, [norm.square() for norm in norms], False, found.place, 0)
    assert found.within.tolist() == [0.0, 0.0, 0.0, 0.0, 1.5]
    taken = found.take()
    assert taken.votes.tolist() == [0.0, 0.0, 0.0, 0.0, 1.5] and taken.scales.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    count_within(own, [norm.square() for norm in norms[::-1]], False, found.place, 0)
    found.begin(0)
    assert found.take().votes.tolist() == [0.0] * 5, "one that has failed has no votes"


@pytest.mark.parametrize(("part", "kind"), [(1, 0), (0, 1), (2, 0), (None, 0)])
def test_a_graph_of_other_groups(part, kind):
    found = scales()
    found.begin(part)
    with pytest.raises(Refusal, match="groups"):
        bound_scales(torch.zeros(()), found.place, kind)
    with pytest.raises(Refusal, match="groups"):
        count_within(torch.ones(2), [torch.ones(1)] * 2, False, found.place, kind)


@pytest.mark.parametrize("groups", [{"up": 2.0}, {"up": 2.0, "down": 1.0}, {"a.up": 2.0, "a.down": 2.0}])
def test_a_part_of_other_groups(groups):
    with pytest.raises(Refusal, match="bounds that move are kept for all trainable parameters of each part"):
        scales().prepare(groups, [[torch.zeros(1)]] * len(groups))


def test_another_model():
    with pytest.raises(Refusal, match="give each model an engine of its own"):
        scales().divide({0: [PartGroup("(root)", "head", 2.0, MEMBERS[0])]})


def test_scales_are_saved_by_name():
    """A whole model has the same groups in another order."""
    found, other = scales(), BoundScales()
    names = ["head", "a.up", "b.up", "a.down", "b.down"]
    other.load(found.saved())
    other.prepare(dict.fromkeys(names, 2.0), MEMBERS)
    assert other.scales.tolist() == [3.0, 2.0, 5.0, 1.0, 4.0]
    assert other.saved() == found.saved()
    with pytest.raises(Refusal, match="had 1 clipping groups, and this model has 5"):
        found.load({"all": 1.0})
    with pytest.raises(Refusal, match="had the clipping groups other, head, .* and this model has a.down, "):
        found.load(dict.fromkeys(["other", *names[:-1]], 1.0))
    found.load([1.0] * 5)  # as older versions have saved them
    assert found.scales.tolist() == [1.0] * 5
