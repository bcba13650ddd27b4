"""How many steps of a plan are spent, in this process and by what a journal remembers."""

from __future__ import annotations

from flashdp_compile.engine.journal import Journal
from flashdp_compile.engine.plan import Plan
from flashdp_compile.errors import BudgetExhaustedError


class Budget:
    """`steps_done` of `plan`: steps that have been taken, or may have been, beginning with those that are `spent`."""

    def __init__(self, plan: Plan, journal: Journal | None, spent: int) -> None:
        self.plan, self._journal, self.steps_done = plan, journal, spent

    @property
    def steps_left(self) -> int | None:
        """How many the run may still take; None if nothing limits it."""
        return None if self.plan.steps is None else max(self.plan.steps - self.steps_done, 0)

    def epsilon(self, delta: float | None = None) -> float:
        """What has been spent so far."""
        return self.plan.epsilon(self.steps_done, delta)

    def reserve(self) -> None:
        """Makes sure of a step, before `spend`. Raises BudgetExhaustedError if none is left."""
        if self.steps_left == 0:
            raise BudgetExhaustedError(
                f"all {self.plan.steps} steps of this run are taken: epsilon is {self.epsilon():.4g} at delta "
                f"{self.plan.delta:g}"
                + ("" if self.plan.target_epsilon is None else f", the target {self.plan.target_epsilon:g}")
                + ". Nothing was released by this step"
            )
        if self._journal is not None:
            self._journal.reserve(self.steps_done + 1, self.plan.steps)

    def spend(self) -> None:
        """Counts a step that was reserved, before its noise is drawn."""
        self.steps_done += 1

    def settle(self) -> None:
        """Gives back what the journal has reserved and nobody spent."""
        if self._journal is not None:
            self._journal.settle(self.steps_done)

    def load(self, steps_done: int) -> None:
        """Goes on where a run was saved. What a journal knows to be spent since stays spent."""
        self.steps_done = max(self.steps_done, steps_done)
