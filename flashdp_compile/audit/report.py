"""What an oracle has seen: how far each change of one sample moved the released sums."""

from __future__ import annotations

from dataclasses import dataclass

from flashdp_compile.passes.dump import table

NEAR = 0.9  # of the bound: a move this long shows that something holds it there


@dataclass(frozen=True)
class Coordinates:
    """Of one parameter: the norm of its move, how many of its coordinates moved, and the one that moved most."""

    norm: float
    moved: int
    size: int
    largest: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """One change of one sample. `allowed` is what C, slack and rounding allow `total` to be, the norm over all
    parameters together; both are of sums that are not divided by a batch size."""

    adjacency: str
    sample: int
    total: float
    allowed: float
    parameters: dict[str, Coordinates]

    @property
    def holds(self) -> bool:
        return self.total <= self.allowed  # NaN does not


@dataclass(frozen=True)
class Sensitivity:
    """All moves, `bound` is C."""

    bound: float
    moves: tuple[Move, ...]

    @property
    def holds(self) -> bool:
        """No move was longer than allowed."""
        return all(move.holds for move in self.moves)

    @property
    def worst(self) -> Move:
        """The longest move, as a share of what it may be."""
        return max(self.moves, key=_share)

    @property
    def moved(self) -> tuple[str, ...]:
        """The parameters that moved, by whichever change."""
        return tuple(name for name in self.worst.parameters if any(m.parameters[name].moved for m in self.moves))

    @property
    def tested(self) -> bool:
        """Whether a move came near its bound. If none did, clipping had nothing to do, and nothing is known of it."""
        return _share(self.worst) >= NEAR

    def __str__(self) -> str:
        kinds = dict.fromkeys(move.adjacency for move in self.moves)
        worst = [max((m for m in self.moves if m.adjacency == kind), key=_share) for kind in kinds]
        changes = [
            (m.adjacency, m.sample, f"{m.total / self.bound:.4f}", f"{m.allowed / self.bound:.4f}", _verdict(m))
            for m in worst
        ]
        coordinates = [
            (name, f"{c.norm / self.bound:.4f}", f"{c.moved} of {c.size}", list(c.largest) if c.moved else "-")
            for name, c in self.worst.parameters.items()
        ]
        return "\n\n".join(
            [
                table(("change", "worst sample", "move / C", "allowed", ""), changes),
                f"sample {self.worst.sample}, {self.worst.adjacency}",
                table(("parameter", "move / C", "coordinates moved", "most"), coordinates),
                self._conclusion(),
            ]
        )

    def _conclusion(self) -> str:
        count = len({move.sample for move in self.moves})
        if not self.holds:
            broken = sum(not move.holds for move in self.moves)
            return f"VIOLATED by {broken} of {len(self.moves)} changes, of {count} samples"
        if not self.tested:
            return f"HOLDS for {count} samples, but none came near C: take a smaller max_grad_norm to see it clip"
        return f"HOLDS for {count} samples"


def _share(move: Move) -> float:
    share = move.total / move.allowed
    return share if share == share else float("inf")


def _verdict(move: Move) -> str:
    return "holds" if move.holds else "VIOLATED"
