"""The k-th largest magnitude of numbers too many to hold: found bit by bit, in four rounds over them.

Magnitudes are positive, and the bits of positive doubles are ordered as the doubles are: each round counts 16 more bits
of those that begin like the one looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tensors.computed import Array

BITS = 16
ROUNDS = 4


class Census:
    """Counts magnitudes of each adapter's changes over all targets.

    Attributes:
        counting: whether numbers are wanted; else thresholds are there to be asked for.
    """

    def __init__(self) -> None:
        self.counting = False
        self._round = 0
        self._wanted: dict[int, Callable[[int], int]] = {}
        self._counts: dict[int, Array] = {}
        self._prefix: dict[int, int] = {}
        self._left: dict[int, int] = {}

    def run(self, once: Callable[[], None]) -> None:
        """Fills the census: `once` goes over all targets, and is called four times."""
        self.counting = True
        for self._round in range(ROUNDS):
            self._counts = {}
            once()
            for t, counts in self._counts.items():
                self._narrow(t, counts)
        self.counting = False

    def feed(self, t: int, values: Array, kept: Callable[[int], int]) -> None:
        """More numbers of adapter t, of which the `kept(count of all)` largest are looked for."""
        import numpy as np

        bits = np.abs(values).astype("<f8").ravel().view("<u8")
        shift = BITS * (ROUNDS - 1 - self._round)
        if self._round:
            bits = bits[bits >> np.uint64(shift + BITS) == np.uint64(self._prefix[t])]
        found = np.bincount((bits >> np.uint64(shift)).astype(np.int64) & (2**BITS - 1), minlength=2**BITS)
        self._counts[t] = self._counts.get(t, 0) + found
        self._wanted[t] = kept

    def threshold(self, t: int) -> float:
        """The smallest of the magnitudes that are kept; infinite where none is."""
        import numpy as np

        return float(np.array([self._prefix[t]], "<u8").view("<f8")[0]) if self._left[t] else float("inf")

    def _narrow(self, t: int, counts: Array) -> None:
        if self._round == 0:
            total = int(counts.sum())
            self._left[t], self._prefix[t] = min(self._wanted[t](total), total), 0
        above = counts[::-1].cumsum()[::-1]
        place = int((above >= self._left[t]).nonzero()[0][-1]) if self._left[t] else 0
        self._left[t] -= int(above[place] - counts[place]) if self._left[t] else 0
        self._prefix[t] = self._prefix[t] << BITS | place
