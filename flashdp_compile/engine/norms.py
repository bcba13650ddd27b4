"""What the accountant of a run is told about the norms by which its samples are clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashdp_compile.checks import integer
from flashdp_compile.engine.bound_rules import accounted_groups, rule_of
from flashdp_compile.errors import OptionError
from flashdp_compile.options import Options


def accounted_norms(options: Options, groups: int | None, bounds: Any) -> tuple[dict[str, Any], int | None]:
    """Arguments of `accounting.epsilon`, and the number of clipping groups that the model must have; neither for exact
    norms. `groups`: how many the user says there are.

    The count of the norms within bounds that follow a quantile is a release of its own, which has a share of each
    step's budget: one more group (docs/randomized_clipping.md).

    Raises:
        OptionError: nothing is known about such norms, or not enough.
    """
    integer("groups", groups, 1, optional=True)
    if options.norm == "exact":
        if groups is not None:
            raise OptionError(f"groups={groups} has no use with norm='exact': leave it out")
        return {}, None
    if isinstance(options.max_grad_norm, Mapping):
        raise OptionError(
            f"max_grad_norm states a bound for each pattern, but with norm={options.norm!r} only groups of equal "
            "bounds are accounted for: give one number, which the groups share"
        )
    if options.clipping == "flat":
        groups = 1 if groups is None else groups
    if groups is None:
        raise OptionError(
            f"groups is missing: with norm={options.norm!r} the noise depends on how many clipping groups the model "
            "has, each with probes of its own. flashdp_compile.explain(...) shows their number, and a step with any "
            "other is refused"
        )
    told = accounted_groups(0.0 if bounds is None else rule_of(bounds).share, groups)
    return {"norm": options.accounted_norm, "probes": options.probes, "groups": told}, groups
