"""The cancellation guard of norms that are computed as sums over pairs of tokens.

Such a norm is est = sum_{t,u} A_tu G_tu, with terms of both signs: if the tokens' gradients cancel, est is a small
difference of large numbers, and rounding may leave it far below the truth, even negative. A norm that is too small is a
clipping factor that is too large, so the result must carry a bound on its own error.

Let r_t^2 be the diagonal term of token t (the squared norm of that token's own gradient) and R = sum_t r_t. By Cauchy
and Schwarz the exact products of the pair (t, u) have absolute sum at most r_t r_u, so all roundings act on numbers
whose absolute sum is at most sum_{t,u} r_t r_u = R^2. In the probabilistic model of rounding (errors of mean zero, at
most u = eps / 2 each, independent; Higham and Mary 2019) a chain of n additions is off by about sqrt(n) u of its
absolute sum. Here, in units of u:

    x_t . x_u and g_t . g_u     2 sqrt(chain)    chain = the longer of both sums: its terms, or its blocks (see below)
    inside a block              16               kernels only, see below
    the pairs, R itself         16               tiles, then slots: trees with leaves of at most some dozens of terms

so gamma = eps (16 + sqrt(chain)), and the true value is at most est + gamma R^2. This supposes errors of one sign in
every pair; in truth they also average out over the pairs.

Tensor cores do not round, they truncate, and that error has one sign: it grows with n, not with sqrt(n). On an H100 a
16-bit dot product of n terms, accumulated by the tensor core alone, was found smaller than the truth by up to n / 19
eps (sum of both Gram matrices): 1e-4 at n = 15104, several times what the model allows. So the kernels let it sum
blocks of at most BLOCK = 128 terms and add those to the accumulator themselves: at most 7 eps for a block of both
matrices (8 are granted), and chain = the number of blocks. With blocks of 32, est was off by at most 0.15 gamma R^2 at
all sizes tried (T to 4096, d, p to 11008).

Norms of embeddings are not sums over pairs: the rows of one id are added up, a chain of at most T additions that is
off by about sqrt(T) u of the sum of their lengths, and then squared. There the bound on the error of the norm is gamma
times the root of the summed squares of those sums (`guarded_root`). For rows too small to be squared there is the floor
that clip.py sets to every norm.

Products of pairs below the smallest normal number may be flushed to zero. A dot product of n terms loses at most n tiny
by it, so every diagonal dot product is raised by n tiny / eps before it enters R (`floor`): gamma R^2 then covers that
loss too. A sample whose gradient is zero therefore gets a squared norm that is not quite zero (of the order of 1e-30).

The caller states SLACK, a relative excess of the clipped norm that the noise accounts for. What is returned is

    max(est, (est + gamma R^2) / (1 + SLACK)^2)

so sqrt(result) (1 + SLACK) is never below the true norm, and est itself comes back unchanged as long as
gamma R^2 <= 2 SLACK est. R^2 / est is 1 for one token or parallel ones and about T for uncorrelated ones, so est is
returned exactly up to T of about 1000 at d, p = 4096; beyond that the norm of such a sample is overestimated a little
(about 0.6 percent at T = 4096, d = 2048, p = 8192). The twin's chain is longer: in float32 it returns est up to T of
about 400 at d, p = 4096. The price of a norm that is too large is utility, never privacy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdp_compile.kernels.codegen import kernel
from flashdp_compile.kernels.common import Launch
from flashdp_compile.kernels.family import Template

SLACK = 2.0**-9
BLOCK = 128  # terms that a tensor core may sum by itself


def gamma(dtype: torch.dtype, chain: int) -> float:
    """Error bound, relative to R^2, of a sum over pairs whose dot products are chains of so many additions."""
    return torch.finfo(dtype).eps * (16 + math.sqrt(chain))


def floor(dtype: torch.dtype, width: int) -> float:
    """What to add to a diagonal dot product of `width` terms so that gamma R^2 covers underflow."""
    info = torch.finfo(dtype)
    return width * (info.tiny / info.eps)


def guarded_root(est: Tensor, bound: Tensor) -> Tensor:
    """The same for sums that are rounded first and squared afterwards: the bound [B] is on the error of the norm."""
    return torch.maximum(est, ((est.sqrt() + bound) / (1 + SLACK)).square())


def guarded(est: Tensor, bound: Tensor) -> Tensor:
    """The value to return for an estimate [B] and its error bound gamma R^2 [B].

    A NaN stays NaN. A negative result (the model of the bound was broken) is left as it is: its root is NaN, so the
    sample is dropped and counted, where clamping to 0 would let it through unclipped.
    """
    return torch.maximum(est, (est + bound) / (1 + SLACK) ** 2)


@dataclass(frozen=True)
class Spec:
    slack: float = (1 + SLACK) ** 2
    block: int = 128


TEMPLATE = Template(
    "guarded_sums",
    """
import triton
import triton.language as tl


@triton.jit
def row_sum(ptr, row, N):
    total = tl.zeros([{{ block }}], tl.float32)
    for first in range(0, N, {{ block }}):
        n = first + tl.arange(0, {{ block }})
        total += tl.load(ptr + row * N + n, mask=n < N, other=0.0)
    return tl.sum(total)


@triton.jit
def kernel(part_ptr, root_ptr, N, M, error, out_ptr):
    row = tl.program_id(0).to(tl.int64)
    est = row_sum(part_ptr, row, N)
    root = row_sum(root_ptr, row, M)
    raised = (est + error * root * root) / {{ slack }}
    tl.store(out_ptr + row, tl.where(est >= raised, est, raised))  # a NaN in either is one here
""",
)


def guarding(rows: int, error: float) -> Callable[[Tensor, Tensor], Tensor]:
    """guarded(part.sum(-1), error root.sum(-1)^2) as one kernel in the place of eight, for so many rows: a function of
    parts of the estimate [..., n] and of R [..., m], float32 and dense."""
    launch = Launch(kernel(TEMPLATE, Spec()), rows)

    def guarded_sums(part: Tensor, root: Tensor) -> Tensor:
        out = part.new_empty(part.shape[:-1])
        launch(part, part, root, part.shape[-1], root.shape[-1], error, out)
        return out

    return guarded_sums
