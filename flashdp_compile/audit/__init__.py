"""Proof by audit: how far one sample moves what is released, and how well a run's samples can be told from it.

    print(audit.sensitivity(model, batch, loss, options=options))
    audit.one_run(train, 1000, guesses=400, delta=1e-5).epsilon  # a lower bound

Neither replaces the proof: an audit finds what is wrong with the data and the attack at hand (docs/audit.md).
"""

from flashdp_compile.audit.bound import epsilon_lower_bound, p_value
from flashdp_compile.audit.dirac import DiracCanaries
from flashdp_compile.audit.one_run import OneRun, one_run
from flashdp_compile.audit.oracle import measure, sensitivity
from flashdp_compile.audit.report import Coordinates, Move, Sensitivity

__all__ = [
    "Coordinates",
    "DiracCanaries",
    "Move",
    "OneRun",
    "Sensitivity",
    "epsilon_lower_bound",
    "measure",
    "one_run",
    "p_value",
    "sensitivity",
]
