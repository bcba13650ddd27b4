"""Random programs: what the axes pass claims holds in runs of the graph, and it accepts what keeps samples apart.

`FLASHDP_EXAMPLES=5000 pytest tests/passes/test_axes_property.py` searches longer, with new examples on every run.
"""

import collections
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import Oracle, Unsound
from pass_support import released_by
from programs import programs
from torch import fx

from flashdp_compile.errors import FlashDPError
from flashdp_compile.passes.axes.domain import Batched, Constant, PointKey, Reduced
from flashdp_compile.passes.axes.engine import Axes, propagate
from flashdp_compile.passes.points import find_points
from flashdp_compile.testing import joint_graph

MORE = int(os.environ.get("FLASHDP_EXAMPLES", "0"))
search = settings(
    max_examples=MORE or 75,
    derandomize=not MORE,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def _axes(program) -> Axes:
    return propagate(joint_graph(program.module(), *program.inputs()))


def test_claims_hold_in_runs():
    """Whatever is accepted, wild steps or not, moves as it is said to move."""
    seen = collections.Counter()

    @search
    @given(programs(wild=True))
    def judge(program):
        try:
            axes = _axes(program)
        except FlashDPError:
            seen["refused", program.wild] += 1
            return
        seen["accepted", program.wild] += 1
        Oracle(axes).check()

    judge()
    print(f"\nprograms: {dict(seen)}")
    assert seen["accepted", True] >= 5 and seen["refused", True] >= 5  # or the search has become blind


def test_safe_programs_are_accepted():
    """A program whose steps all stay within a sample is not refused, and its release is the plain gradient."""
    seen = collections.Counter()

    @search
    @given(programs(wild=False))
    def judge(program):
        axes = _axes(program)
        Oracle(axes).check()
        gradients = find_points(axes)
        seen["gradients"] += len(gradients)
        plain, released = released_by(axes, gradients, "materialize")
        for name, expected in plain.items():
            torch.testing.assert_close(released[name], expected, rtol=1e-7, atol=1e-8)

    judge()
    print(f"\ngradients: {dict(seen)}")
    assert seen["gradients"] >= 100


def _claim(function, state_of_result) -> Axes:
    """A graph of one step over x [3, 3] with an invented claim about its result."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

        def forward(self, x):
            return function(x @ self.w)

    joint = joint_graph(Net(), torch.randn(3, 3, dtype=torch.float64))
    node = joint.outputs[0]
    states = dict.fromkeys((n for n in joint.graph.nodes if n.op != "output"), None)
    states |= {n: Constant() for n in joint.parameters} | {n: Batched(0) for n in joint.samples}
    states |= dict.fromkeys(joint.tangents, Constant())
    return Axes(joint, states | {node: state_of_result(node)})


@pytest.mark.parametrize(
    "function, state",
    [
        (lambda h: h - h.mean(0), lambda n: Batched(0)),
        (lambda h: h.t() + 0, lambda n: Batched(0)),
        (lambda h: h * torch.arange(3)[:, None], lambda n: Batched(0)),
        (lambda h: (h * torch.arange(3)[:, None]).sum(0), lambda n: _sum_at(n)),
        (lambda h: h.flip(0), lambda n: Batched(0)),
        (lambda h: h + 0, lambda n: Constant()),
        (lambda h: h * 0 + 1, lambda n: Constant(zero=True)),
        (lambda h: h.sum(0).square(), lambda n: _sum_at(n)),
        (lambda h: h.sum(0) + 1, lambda n: _sum_at(n)),
    ],
)
def test_the_oracle_finds_wrong_claims(function, state):
    with pytest.raises(Unsound):
        Oracle(_claim(function, state)).check()


def test_the_oracle_agrees_with_right_claims():
    Oracle(_claim(lambda h: h.flip(1), lambda n: Batched(0))).check()
    Oracle(_claim(lambda h: h.sum(0) * 2, _sum_at)).check()


def _sum_at(node: fx.Node):
    """The claim to be linear in the first sum over dimension 0 that feeds a value."""
    while "sum" not in str(node.target):
        node = node.all_input_nodes[0]
    return Reduced((PointKey(node),))
