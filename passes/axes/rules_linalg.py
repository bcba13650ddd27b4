"""Linear algebra on the matrices in the last two dimensions; all dimensions in front of them are independent."""

from __future__ import annotations

from typing import Any

from flashdp_compile.passes.axes.domain import Batched, Reject, Site
from flashdp_compile.passes.axes.registry import first_reduced, linear, rule
from flashdp_compile.passes.axes.rules_pointwise import operands_with_states
from flashdp_compile.passes.axes.uniform import same_for_all


@rule(
    "aten._linalg_solve_ex.default",
    "aten.linalg_inv_ex.default",
    "aten.linalg_cholesky_ex.default",
    "aten.linalg_lu.default",
    "aten.linalg_lu_factor_ex.default",
    "aten.linalg_lu_solve.default",
    "aten.linalg_solve_triangular.default",
    "aten.linalg_qr.default",
    "aten.linalg_matrix_exp.default",
    "aten._linalg_eigh.default",
    "aten._linalg_svd.default",
    "aten._linalg_det.default",
    "aten._linalg_slogdet.default",
    "aten.triangular_solve.default",
    "aten.cholesky_solve.default",
    "aten.cholesky_inverse.default",
)
def matrices(site: Site, *operands: Any, **options: Any) -> Any:
    """Each matrix is treated alone, so the batch may be any dimension in front, in the same place for all operands."""
    results = site.node.meta["val"]
    given = operands_with_states(site, operands, options)
    lead = max(len(site.shape(n)) - _own(site, n) for n, _ in given)
    axis: Batched | None = None
    for node, state in given:
        if not isinstance(state, Batched):
            continue
        front = len(site.shape(node)) - _own(site, node)
        if state.dim >= front:
            raise Reject(
                "the batch is a dimension of its matrices", "keep the batch in front of the last two dimensions"
            )
        moved = Batched(state.dim + lead - front, state.outer, state.inner)
        if axis not in (None, moved):
            raise Reject("its matrices hold their samples in different places", "align the batch dimensions first")
        axis = moved
    assert axis is not None
    for node, state in given:
        same_for_all(site, node, state, axis.at(axis.dim + len(site.shape(node)) - _own(site, node) - lead))
    return (axis,) * len(results) if isinstance(results, (tuple, list)) else axis


def _own(site: Site, node: Any) -> int:
    """How many of an operand's dimensions are one matrix: one for pivots, and for the right side of A x = b."""
    value = node.meta["val"]
    if not (value.is_floating_point() or value.is_complex()):
        return 1
    solves = "solve_ex" in str(site.node.target) and node is site.node.args[1]
    return 1 if solves and len(site.shape()) < site.arg_rank(0) else 2


def _linear_in_b(factors: Any, b: Any, *rest: Any, **options: Any) -> bool:
    """X in A X = B, which is linear in B alone."""
    return first_reduced(b, factors, *rest)


def _linear_in_b_after_pivots(factors: Any, pivots: Any, b: Any, *rest: Any, **options: Any) -> bool:
    return first_reduced(b, factors, pivots, *rest)


# The backward of a weight that solves a system, such as the Cayley map of torch.nn.utils.parametrizations.orthogonal.
linear(_linear_in_b, "aten.linalg_solve_triangular.default")
linear(_linear_in_b_after_pivots, "aten.linalg_lu_solve.default")
linear(first_reduced, "aten.cholesky_solve.default")
