"""What is counted over all targets before any of them is computed: thresholds of whole adapters, and majorities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from .selection import Selection, settle

if TYPE_CHECKING:
    from .blocks import Blocks


class Census:
    """Numbers of each adapter's changes over all targets.

    Attributes:
        counting: whether formulas are run to feed it; their results are not used then.
        majority: the sign of most entries over all targets, 1 or -1; worked out when it is first asked for.
    """

    def __init__(self) -> None:
        self.counting = False
        self._selections: dict[int, Selection] = {}
        self._sampling = False
        self._lock = Lock()
        self._vote: Callable[[Census], None] | None = None
        self._votes: int | None = None
        self._majority: int | None = None

    def run(self, once: Callable[[], None]) -> None:
        """Fills the census: `once` runs the formula at all targets, about three times."""
        self.counting = self._sampling = True
        once()
        self._sampling = False
        settle(list(self._selections.values()), once)
        self.counting = False

    def count(self, adapters: Sequence[int], blocks: Blocks, wanted: Sequence[Callable[[int, int], int]]) -> None:
        """Counts the magnitudes of some adapters' changes at one weight.

        Args:
            adapters: which adapters the changes are of.
            blocks: the changes.
            wanted: how many of the largest are looked for, from the number of all, for each adapter.
        """
        import numpy as np

        with self._lock:
            for adapter, kept in zip(adapters, wanted, strict=True):
                self._selections.setdefault(adapter, Selection(kept))
        searched = [(i, self._selections[adapter]) for i, adapter in enumerate(adapters)]
        if self._sampling:
            drawn = np.abs(blocks.sample())
            for i, selection in searched:
                selection.sample(drawn[i], blocks.size)
            return
        searched = [(i, selection) for i, selection in searched if selection.found is None]
        for _, changes in blocks:
            for i, selection in searched:
                selection.feed(np.abs(changes[i]).reshape(-1))

    def threshold(self, adapter: int) -> float:
        """The smallest of an adapter's magnitudes that are kept; infinite where none is."""
        found = self._selections[adapter].found
        assert found is not None
        return found.value

    def votes_by(self, vote: Callable[[Census], None]) -> None:
        """Says how all targets are gone over for the majority, which few combinations need: see `majority`."""
        self._vote = vote

    @property
    def voting(self) -> bool:
        """Whether formulas are run for `add_votes` alone."""
        return self._votes is not None

    def add_votes(self, signs: int) -> None:
        """The sum of the elected signs at one weight."""
        with self._lock:
            assert self._votes is not None
            self._votes += signs

    @property
    def majority(self) -> int:
        with self._lock:
            if self._majority is None:
                assert self._vote is not None
                poll = Census()
                poll._selections, poll._votes = self._selections, 0
                self._vote(poll)
                self._majority = -1 if poll._votes < 0 else 1
            return self._majority
