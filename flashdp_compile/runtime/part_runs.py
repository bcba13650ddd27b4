"""What compiled parts of one model know of each other while they run backward (parts.py).

Compiled code knows this by its place in a list of this process, as it knows scalers (scaling.py): parts of one class
share it, so that which of them runs must be told.
"""

from __future__ import annotations

__all__ = ["PartRuns"]

_known: list[PartRuns] = []


class PartRuns:
    """Of the models of one engine that are compiled part by part."""

    def __init__(self) -> None:
        self.place = len(_known)
        _known.append(self)
