"""Iterate over the changes that several adapters make to one weight, in blocks of rows.

The product of LoRA factors of rank 16 for a 4096 x 4096 weight takes 0.02 s and 134 MB in float64, so eight products
take a gigabyte. Formulas that need every entry therefore iterate over blocks, two or three times. Each iteration
computes all products again, and memory contains one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .lowering import Delta
from .selection import SHARE, WHOLE, Selected, Selection, settle

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..io.computed import Array

ENTRIES = 1 << 18
"""The number of entries in a block, over all changes. A formula's temporary arrays of 2 MB (float64) fit in caches."""


class Blocks:
    """The changes of one weight, side by side.

    Iteration yields `(rows, changes)`: a slice of rows, and the changes of these rows as float64 `[T, rows, columns]`.
    Callers may modify the array; the next block overwrites it.

    Attributes:
        shape: the shape of one change, `[out, in * k]`; a bias has one row.
        count: T, the number of changes.
        size: the number of entries in one change.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = list(deltas)
        self.shape, self.count = deltas[0].shape, len(deltas)
        self.size = self.shape[0] * self.shape[1]
        self.step = max(1, ENTRIES // max(self.count * self.shape[1], 1))

    @classmethod
    def of(cls, changes: Array) -> Blocks:
        """Return the blocks for changes of a bias, `[T, out]`; each change becomes a matrix with one row."""
        return cls([_whole(change[None]) for change in changes])

    def __iter__(self) -> Iterator[tuple[slice, Array]]:
        import numpy as np

        out, columns = self.shape
        held = np.empty((self.count, min(self.step, out), columns))
        for start in range(0, out, self.step):
            rows = slice(start, min(start + self.step, out))
            block = held[:, : rows.stop - start]
            for D, delta in zip(block, self.deltas, strict=True):
                _form(delta, rows, D)
            yield rows, block

    def sample(self) -> Array:
        """Return entries at random positions, equal for all changes, as `[T, n]`.

        Return all entries if the changes are small.
        """
        import numpy as np

        out, columns = self.shape
        if self.size <= WHOLE:
            return np.stack([delta.dense().reshape(-1) for delta in self.deltas])
        count = max(WHOLE, self.size // SHARE)
        # A fixed seed is enough, because the sample affects only the time. Compute only the drawn entries of a product,
        # which takes n operations per rank.
        random = np.random.default_rng(0)
        i, j = random.integers(out, size=count), random.integers(columns, size=count)
        found = np.empty((self.count, count))
        for values, delta in zip(found, self.deltas, strict=True):
            values[:] = 0.0 if delta.rest is None else delta.rest[i, j]
            for b, a in zip(delta.B.T, delta.A, strict=True):
                values += b[i] * a[j]
        return found

    def select(
        self, key: Callable[[Array], Array], wanted: Sequence[Callable[[int, int], int]], each: int = 1
    ) -> list[Selected]:
        """Compute series of values from the changes, and return the k-th largest value of each series.

        Args:
            key: a function of changes `[T, ...]`; its result has one series per index of the first axis.
            wanted: functions of (length of the series, number of its nonzero values) that return k; `each` functions
                per series.
            each: the number of values to find per series.
        """
        import numpy as np

        selections = [Selection(k) for k in wanted]

        def series(values: Array, number: int) -> Array:
            found: Array = values[number // each].reshape(-1)
            return found

        drawn = key(self.sample())
        for number, selection in enumerate(selections):
            selection.sample(series(drawn, number), self.size)

        def once() -> None:
            for _, changes in self:
                values = key(changes)
                for number, selection in enumerate(selections):
                    if selection.found is None:
                        selection.feed(np.ascontiguousarray(series(values, number)))

        settle(selections, once)
        return [selection.found for selection in selections if selection.found is not None]


def _form(delta: Delta, rows: slice, D: Array) -> None:
    """Write some rows of a change into D."""
    import numpy as np

    if delta.rest is not None and not delta.rank:
        D[...] = delta.rest[rows]
        return
    np.matmul(delta.B[rows], delta.A, out=D)
    if delta.rest is not None:
        D += delta.rest[rows]


def _whole(D: Array) -> Delta:
    import numpy as np

    return Delta(np.zeros((len(D), 0)), np.zeros((0, D.shape[1])), D)
