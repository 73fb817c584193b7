"""Describe which rows of a fused weight in one naming are which rows in another naming."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of a weight.

    The weight is divided into `of` equal parts, and the rows are parts `start` to `stop`.

    Attributes:
        start: the index of the first part.
        stop: the index after the last part.
        of: the number of equal parts of the whole weight.
    """

    start: int = 0
    stop: int = 1
    of: int = 1

    @property
    def parts(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether the run has all rows of the weight."""
        return self.parts == self.of


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a module in one naming, and the same rows in another naming.

    Attributes:
        path: the module in the other naming.
        here: the rows in the module of the first naming.
        there: the rows in `path`.
    """

    path: str
    here: Run = Run()
    there: Run = Run()


def merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Sort pieces by their rows, and join pieces that are adjacent in both namings."""
    found: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.here.start):
        last = found[-1] if found else None
        if last is not None and _adjacent(last, piece):
            here = replace(last.here, stop=piece.here.stop)
            there = replace(last.there, stop=piece.there.stop)
            found[-1] = Piece(piece.path, here, there)
        else:
            found.append(piece)
    return tuple(replace(each, here=_reduced(each.here), there=_reduced(each.there)) for each in found)


def _adjacent(one: Piece, other: Piece) -> bool:
    same = one.path == other.path and one.here.stop == other.here.start and one.there.stop == other.there.start
    return same and one.here.parts * other.there.parts == other.here.parts * one.there.parts


def _reduced(run: Run) -> Run:
    return Run() if run.whole else run
