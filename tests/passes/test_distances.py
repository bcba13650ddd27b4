"""The formulas for distances against torch's own ops, where values coincide too."""

import math

import pytest
import torch

from flashdp_compile.passes.apart.distances import cdist, cdist_backward

aten = torch.ops.aten


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf])
def test_like_torch(p):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, rows, 4, dtype=torch.float64, generator=generator) for rows in (5, 3))
    y[:, 0], y[:, 1, :2] = x[:, 0], x[:, 1, :2]  # a distance, and differences, of zero
    distance = aten._cdist_forward(x, y, p, 2)
    torch.testing.assert_close(cdist(x, y, p, 2), distance)
    grad = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    expected = aten._cdist_backward(grad, x, y, p, distance)
    assert p == 0 or expected.abs().max() > 0.1
    torch.testing.assert_close(cdist_backward(grad, x, y, p, distance), expected)
