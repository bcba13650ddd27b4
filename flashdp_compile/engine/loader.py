"""The engine's loader, which remembers what it has handed out until backward passes have used it."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashdp_compile.checks import integer
from flashdp_compile.data import PrivateLoader


class HandedOut(NamedTuple):
    """A micro-batch: of which logical batch, and whether it ends it."""

    logical: int
    last: bool


class EngineLoader(PrivateLoader):
    """`read_ahead` is how many batches a training loop takes before it uses them."""

    def __init__(self, *args: Any, read_ahead: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.read_ahead = integer("read_ahead", read_ahead, 0)
        self.handed_out: list[HandedOut] = []

    def _handed_out(self, batch: Any, size: int) -> Any:
        self.handed_out.append(HandedOut(self.steps_done - self.last, self.last))
        return super()._handed_out(batch, size)

    def after(self, used: int, passes: int) -> tuple[bool, str]:
        """Whether a logical batch is complete with the last of so many `passes` behind the first `used` batches; and
        what is wrong with them, if anything is."""
        mine = self.handed_out[used : used + passes]
        handed = self.handed_out[used : max(len(self.handed_out) - self.read_ahead, used)]
        if passes == 0 or len(mine) < passes or len(handed) > passes:
            several = f"{len(handed)} micro-batches" if len(handed) != 1 else "1 micro-batch"
            return False, f"the loader has handed out {several} for them"
        if mine[0].logical != mine[-1].logical:
            return False, "the loader has handed out samples of several logical batches for them"
        return mine[-1].last, ""
