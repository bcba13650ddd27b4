"""The options of the backend that an engine compiles with: those of the user, and what follows from its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashdp_compile.engine.part_groups import BY_PART
from flashdp_compile.errors import OptionError

OWN = (
    "max_grad_norm",
    "clipping",
    "noise_multiplier",
    "expected_batch_size",
    "noise_at",
    "from_engine",
    "seed",
    "grad_scaler",
)


def with_own(options: Mapping[str, Any] | None, max_grad_norm: Any, clipping: Any, batch: int) -> dict[str, Any]:
    """The user's `options` and what is known of the engine's own before its noise is. `batch`: expected_batch_size.

    Raises:
        OptionError: the user's hold what is the engine's own.
    """
    given = dict(options or {})
    if twice := sorted({*OWN} & given.keys()):
        raise OptionError(
            f"options holds {twice[0]!r}, which is the engine's own: leave it out, or give it as an argument"
        )
    if given.get("loss_reduction", "mean") != "mean":
        raise OptionError(
            "options holds loss_reduction, but a step is divided by expected_batch_size: call backward on means"
        )
    return {
        **given,
        "max_grad_norm": max_grad_norm,
        "clipping": {"*": "all"} if clipping == BY_PART else clipping,
        "expected_batch_size": batch,
        "noise_at": "step",
    }
