"""Gaussian probes: matrices P [rows, probes] of independent N(0, 1 / probes), drawn where they are used.

What is multiplied with P has in the mean the squared norm that it had: E |v^T P|^2 = |v|^2. Entries are those of
gaussian.py, over the root of `probes`: any row of P can be drawn alone, and equal (key, stream) give equal P.
"""

import math

import torch
from torch import Tensor

from flashdp_compile.kernels.gaussian import gaussian

LEAST, MOST = 16, 256  # probes: a power of two, as tiles are


def probe_matrix(key: Tensor, stream: int, rows: int, probes: int, dtype: torch.dtype) -> Tensor:
    """P [rows, probes] of a key [2] and a stream, in float32 or float64."""
    return gaussian((rows, probes), key, stream).to(dtype) / math.sqrt(probes)
