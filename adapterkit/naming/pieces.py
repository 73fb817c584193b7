"""How the rows of one naming's weights lie in another's: fractions of the outputs of a fused weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a fused weight, and where another naming has them.

    Attributes:
        pattern: the other naming's module.
        start: the first row, in parts of `of`.
        stop: behind the last row, likewise.
        of: how many parts the fused weight has.
        there: where the rows begin in the other's weight, in the same parts; None where they are all of it.
    """

    pattern: str
    start: int = 0
    stop: int = 1
    of: int = 1
    there: int | None = None

    @property
    def parts(self) -> int:
        return self.stop - self.start


Table = Mapping[str, tuple[Piece, ...]]
"""Pattern of the one naming -> its pieces in the other."""


def whole(pattern: str) -> tuple[Piece, ...]:
    """A module that both namings have as it is."""
    return (Piece(pattern),)


def thirds(*patterns: str) -> tuple[Piece, ...]:
    """Queries, keys and values, one after the other."""
    return tuple(Piece(pattern, n, n + 1, len(patterns)) for n, pattern in enumerate(patterns))
