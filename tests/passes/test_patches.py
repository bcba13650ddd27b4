"""Convolutions of patches and of single pixels as matrix products: values, what is left alone, and what points find."""

import pytest
import torch
from torch import nn

from flashdp_compile.passes.apart import patches
from flashdp_compile.passes.apart.patches import take_patches_apart
from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.points import find_points
from flashdp_compile.testing import joint_graph

aten = torch.ops.aten

# layer, sizes of an input of 3 channels: whole patches, some pixels left over, strides without and with windows
APART = {
    "patches": (nn.Conv2d(3, 5, 2, stride=2), (4, 6)),
    "left over": (nn.Conv2d(3, 5, (2, 3), stride=(2, 3)), (5, 8)),
    "without bias": (nn.Conv2d(3, 5, 3, stride=3, bias=False), (7, 7)),
    "pixels": (nn.Conv2d(3, 5, 1), (4, 3)),
    "every other pixel": (nn.Conv2d(3, 5, 1, stride=2), (5, 4)),
    "pixels along one side": (nn.Conv2d(3, 5, (1, 2), stride=(3, 2)), (7, 5)),
    "one window": (nn.Conv2d(3, 5, 4, stride=4), (4, 4)),
    "sequences": (nn.Conv1d(3, 5, 4, stride=4), (9,)),
    "volumes": (nn.Conv3d(3, 5, 2, stride=2), (4, 3, 2)),
    "dilated pixels": (nn.Conv2d(3, 5, 1, dilation=2), (4, 3)),
}
LEFT = {
    "overlapping": nn.Conv2d(3, 6, 3, stride=2),
    "gaps": nn.Conv2d(3, 6, 2, stride=3),
    "padded": nn.Conv2d(3, 6, 2, stride=2, padding=1),
    "dilated": nn.Conv2d(3, 6, 2, stride=2, dilation=2),
    "grouped": nn.Conv2d(3, 6, 2, stride=2, groups=3),
    "transposed": nn.ConvTranspose2d(3, 6, 2, stride=2),
}


@pytest.mark.parametrize("input_too", [True, False])
@pytest.mark.parametrize("name", APART)
def test_the_formula_is_that_of_torch(name, input_too):
    layer, sizes = APART[name]
    layer = layer.double()
    x = torch.randn(4, 3, *sizes, dtype=torch.float64)
    grad = torch.randn_like(layer(x))
    bias = None if layer.bias is None else list(layer.bias.shape)
    count = len(sizes)
    arguments = (grad, x, layer.weight, bias, layer.stride, layer.padding, layer.dilation, False, [0] * count, 1)
    mask = [input_too, True, bias is not None]
    found = patches.convolution_backward(*arguments, mask)
    expected = aten.convolution_backward(*arguments, mask)
    assert [f is None for f in found] == [not m for m in mask]
    for one, other, wanted in zip(found, expected, mask, strict=True):
        if wanted:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", APART)
def test_their_points_are_those_of_a_linear_layer(name):
    """In place, and for a bias a point of its own; with another layer in front, the input's gradient stays an op."""
    layer, sizes = APART[name]
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), layer) if len(sizes) == 2 else layer
    joint = joint_graph(model.float(), torch.randn(4, 3, *sizes))
    before = len(joint.graph.find_nodes(op="call_function", target=aten.convolution_backward.default))
    assert take_patches_apart(joint.graph) == 1
    left = joint.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert len(left) == before - (len(sizes) != 2)
    joint.graph.lint()


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_alone(name):
    joint = joint_graph(LEFT[name], torch.randn(4, 3, 6, 6))
    assert take_patches_apart(joint.graph) == 0
    assert {g.name.split(".")[-1]: g.kind for g in find_points(propagate(joint))}["weight"] == "convolution"


def test_a_frozen_filter_is_left_alone():
    layer = nn.Conv2d(3, 5, 2, stride=2)
    layer.weight.requires_grad_(False)
    assert take_patches_apart(joint_graph(layer, torch.randn(4, 3, 4, 4)).graph) == 0
