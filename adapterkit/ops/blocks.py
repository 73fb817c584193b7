"""Iterate over the changes that several adapters make to one weight, in blocks of rows, and select the largest values.

The product of LoRA factors of rank 16 for a 4096 x 4096 weight takes 0.02 s and 134 MB in float64, so eight products
take a gigabyte. Therefore, a formula that needs every entry keeps only one block of rows in memory. It iterates over
all blocks two or three times, and each iteration computes all products again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from .differences import too_large
from .lowering import Delta

if TYPE_CHECKING:
    from ..io.computed import Array

# Find the exact k-th largest value of a series that does not fit into memory, by reading all values a few times.
#
# First, estimate an interval from a sample. With a probability of 1 - 1e-8, the interval contains the k-th largest
# value. Then read all values, count the values above the interval, and keep the values inside it in memory. If too many
# values are expected inside, do not keep them: divide the interval into bins, and count the values in each bin. The bin
# that contains the k-th largest value is the interval of the next pass. The leading bits of a value select its bin,
# because positive doubles have the same order as their bits, read as integers. A bad sample only costs time: if the
# k-th largest value is outside the interval, the next pass searches the adjacent range.


MAX_NUMBERS = 1 << 19
"""The values inside an interval are kept in memory only if at most this many are expected."""

BINS = 1 << 16
"""The number of bins for an interval in which more than `MAX_NUMBERS` values are expected."""

SHARE = 256
"""In a tensor with more than `WHOLE` entries, one in `SHARE` entries is sampled, but at least `WHOLE` entries."""

WHOLE = 1 << 12
"""If a tensor has at most this many entries, all of them are sampled; otherwise, at least this many are sampled."""

DEVIATIONS = 6.0
"""Half the width of the first interval, in standard deviations of a rank that is estimated from the sample.

A value's rank is its position in descending order. Let d be this number times the standard deviation. The interval
reaches from the sampled value with the estimated rank k - d to the sampled value with the estimated rank k + d.
"""

WIDER = 1.25
"""The factor by which the interval is widened at both ends if only a few targets were sampled.

In this case, the interval must be wider, because magnitudes differ between layers.
"""

LARGEST = 0x7FEFFFFFFFFFFFFF
"""The bits of the largest double, as an integer."""


@dataclass(slots=True, eq=False)
class Selected:
    """The k-th largest value of a series.

    Attributes:
        value: the k-th largest value; infinity if k is 0; the smallest value if k is at least the number of values.
        above: the number of values in the series that are larger than `value`.
        equal: the number of values in the series that equal `value`.
        total: the number of values in the series.
    """

    value: float
    above: int
    equal: int
    total: int


@dataclass(slots=True, eq=False)
class Selection:
    """The search for the k-th largest value of a series.

    In each pass, the caller calls `begin`, passes all values of the series to `feed`, piece by piece, and calls `end`.
    Passes are repeated until `selected` is set.

    Attributes:
        wanted: a function of (number of values, number of nonzero values) that returns k.
        partial: whether samples come from only a part of the series. If so, the estimate from the samples is less
            reliable, because the rest of the series may have other magnitudes.
        selected: the result; None until the search is finished.
    """

    wanted: Callable[[int, int], int]
    partial: bool = False
    selected: Selected | None = None
    _lo: int = 0
    _hi: int = LARGEST
    _samples: list[tuple[Array, float]] = field(default_factory=list)
    _total: int = 0
    _nonzero: int = 0
    _above: int = 0
    _inside: int = 0
    _values: list[Array] | None = None
    _bins: Array | None = None
    _expected: float = math.inf
    _lock: Any = field(default_factory=Lock)

    def sample(self, values: Array, of: int) -> None:
        """Add a sample: `values`, which were drawn from `of` values of the series. Call this method before `begin`."""
        with self._lock:
            self._samples.append((values, of / max(values.size, 1)))

    def begin(self) -> None:
        """Start one pass over the series."""
        import numpy as np

        if self._samples:
            self._guess()
        self._total = self._nonzero = self._above = self._inside = 0
        # If the interval contains a single number, all values inside it are equal, so count them and do not keep them.
        # For sparse changes, the interval often contains only the number 0.
        several = self._lo < self._hi
        self._values = [] if several and self._expected <= MAX_NUMBERS else None
        self._bins = np.zeros(BINS, np.int64) if several and self._values is None else None

    def feed(self, values: Array) -> None:
        """Add some values of the series to the current pass. No value may be negative.

        Several threads may call this method at the same time.
        """
        import numpy as np

        lo, hi = _double(self._lo), _double(self._hi)
        larger = values > hi
        above = int(np.count_nonzero(larger))
        # `larger` implies `values >= lo`, so xor selects the values from lo to hi.
        inside = values[(values >= lo) ^ larger] if above else values[values >= lo]
        bins = None
        if self._bins is not None:
            places = (inside.astype("<f8", copy=False).view("<u8") - np.uint64(self._lo)) >> np.uint64(self._shift)
            bins = np.bincount(places.astype(np.int64), minlength=BINS)
        # Compare with 0 first, because `count_nonzero` takes three times as long for floats as for booleans.
        nonzero = int(np.count_nonzero(values != 0))
        with self._lock:
            self._total += values.size
            self._nonzero += nonzero
            self._above += above
            self._inside += inside.size
            if bins is not None and self._bins is not None:
                self._bins += bins
            elif self._values is not None:
                self._values.append(inside)

    def end(self) -> None:
        """Finish one pass over the series: set `selected`, or choose the interval for the next pass."""
        import numpy as np

        k = min(self.wanted(self._total, self._nonzero), self._total)
        if k <= 0:
            self.selected = Selected(math.inf, 0, 0, self._total)
        elif k <= self._above:
            self._interval(self._hi + 1, LARGEST, math.inf)
        elif k > self._above + self._inside:
            self._interval(0, self._lo - 1, math.inf)
        elif self._lo == self._hi:
            self.selected = Selected(_double(self._lo), self._above, self._inside, self._total)
        elif self._values is not None:
            inside = np.concatenate(self._values)
            place = inside.size - (k - self._above)
            value = float(np.partition(inside, place)[place])
            above = self._above + int(np.count_nonzero(inside > value))
            self.selected = Selected(value, above, int(np.count_nonzero(inside == value)), self._total)
        else:
            self._narrow(k)
        self._values, self._bins = None, None

    def _narrow(self, k: int) -> None:
        assert self._bins is not None
        above = self._above + self._bins[::-1].cumsum()[::-1]
        place = int((above >= k).nonzero()[0][-1])
        lo = self._lo + (place << self._shift)
        hi = min(lo + (1 << self._shift) - 1, self._hi)
        self._interval(lo, hi, float(self._bins[place]))

    @property
    def _shift(self) -> int:
        return max((self._hi - self._lo + 1).bit_length() - BINS.bit_length() + 1, 0)

    def _interval(self, lo: int, hi: int, expected: float) -> None:
        if lo > hi:  # The values contain an infinity, which is above every interval, or a NaN, which is in none.
            raise too_large()
        self._lo, self._hi, self._expected = lo, hi, expected

    def _guess(self) -> None:
        """Estimate the first interval from the samples; each sampled value represents several values of its tensor."""
        import numpy as np

        values = np.concatenate([v for v, _ in self._samples])
        weights = np.repeat([w for _, w in self._samples], [v.size for v, _ in self._samples])
        self._samples = []
        if not values.size:
            return
        order = np.argsort(-values)
        values, reach = values[order], np.cumsum(weights[order])
        total = reach[-1]
        share = weights[order][values > 0].sum()
        k = float(min(self.wanted(round(total), round(share)), total))
        spread = DEVIATIONS * math.sqrt(max(k * (total - k) / total, 1.0) * weights.max()) if weights.max() > 1 else 0.0
        first, last = (int(np.searchsorted(reach, rank)) for rank in (k - spread, k + spread))
        wider = WIDER if self.partial else 1.0
        hi = _bits(wider * float(values[first])) if k - spread > 0 and first < len(values) else LARGEST
        lo = _bits(float(values[last]) / wider) if last < len(values) else 0
        expected = math.inf if self.partial else float(reach[min(last, len(values) - 1)] - reach[max(first - 1, 0)])
        self._interval(min(lo, hi), min(hi, LARGEST), expected)


def _bits(value: float) -> int:
    import struct

    return int(struct.unpack("<Q", struct.pack("<d", value))[0])


def _double(bits: int) -> float:
    import struct

    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def settle(selections: Sequence[Selection], once: Callable[[], object]) -> None:
    """Call `once` until all selections have results. Each call must pass all values of the series to the selections."""
    while open_ := [each for each in selections if each.selected is None]:
        for each in open_:
            each.begin()
        once()
        for each in open_:
            each.end()


# Blocks of rows.


ENTRIES = 1 << 18
"""The largest size of a block in entries, over all changes together. A block with a single row may be larger.

With this size, a temporary array of a formula takes 2 MB in float64, and the arrays fit in the processor's caches.
"""


class Blocks:
    """The changes that several adapters make to one weight, as an iterable of blocks of rows.

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
        """Return the changes of a bias, `[T, out]`, as blocks; each change becomes a matrix with one row."""
        import numpy as np

        empty = np.zeros((1, 0)), np.zeros((0, changes.shape[1]))
        return cls([Delta(*empty, change[None]) for change in changes])

    def __iter__(self) -> Iterator[tuple[slice, Array]]:
        import numpy as np

        out, columns = self.shape
        buffer = np.empty((self.count, min(self.step, out), columns))
        for start in range(0, out, self.step):
            rows = slice(start, min(start + self.step, out))
            block = buffer[:, : rows.stop - start]
            for D, delta in zip(block, self.deltas, strict=True):
                _form(delta, rows, D)
            yield rows, block

    def sample(self) -> Array:
        """Return the entries of all changes at n random positions, `[T, n]`. All changes use the same positions.

        If a change has at most `WHOLE` entries, return all entries.
        """
        import numpy as np

        out, columns = self.shape
        if self.size <= WHOLE:
            return np.stack([delta.dense().reshape(-1) for delta in self.deltas])
        count = max(WHOLE, self.size // SHARE)
        # A fixed seed is enough, because the sample affects the running time, but not the result. For low-rank factors,
        # compute only the drawn entries of the product. The work for each entry is proportional to the rank.
        random = np.random.default_rng(0)
        i, j = random.integers(out, size=count), random.integers(columns, size=count)
        values_at = np.empty((self.count, count))
        for values, delta in zip(values_at, self.deltas, strict=True):
            values[:] = 0.0 if delta.rest is None else delta.rest[i, j]
            for b, a in zip(delta.B.T, delta.A, strict=True):
                values += b[i] * a[j]
        return values_at

    def select(
        self, key: Callable[[Array], Array], wanted: Sequence[Callable[[int, int], int]], each: int = 1
    ) -> list[Selected]:
        """Compute series of values from the changes, and find the k-th largest value of each series.

        One series may be searched for several values of k.

        Args:
            key: a function of changes `[T, ...]`. Each index of the first axis of its result is one series.
            wanted: functions of (length of the series, number of its nonzero values) that return k. The first `each`
                functions are for the first series, the next `each` functions for the second series, and so on.
            each: the number of values of k per series.

        Returns:
            one result per function in `wanted`.
        """
        import numpy as np

        selections = [Selection(k) for k in wanted]

        def series(values: Array, number: int) -> Array:
            chosen: Array = values[number // each].reshape(-1)
            return chosen

        drawn = key(self.sample())
        for number, selection in enumerate(selections):
            selection.sample(series(drawn, number), self.size)

        def once() -> None:
            for _, changes in self:
                values = key(changes)
                for number, selection in enumerate(selections):
                    if selection.selected is None:
                        selection.feed(np.ascontiguousarray(series(values, number)))

        settle(selections, once)
        return [selection.selected for selection in selections if selection.selected is not None]


def _form(delta: Delta, rows: slice, D: Array) -> None:
    """Compute some rows of a change, and write them into D."""
    import numpy as np

    if delta.rest is not None and not delta.rank:
        D[...] = delta.rest[rows]
        return
    np.matmul(delta.B[rows], delta.A, out=D)
    if delta.rest is not None:
        D += delta.rest[rows]
