"""The k-th largest of numbers too many to hold, exactly, by going over them a few times.

A sample tells an interval that holds the number but for a probability of 1e-8. Going over all numbers, those above the
interval are counted, and those inside it are kept, or, where they are too many, counted by their leading bits; then one
bin of those is the next interval. The bits of positive doubles are ordered as the doubles are. What the sample says
decides on the time alone: an interval that does not hold the number is replaced by what is beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from .differences import too_large

if TYPE_CHECKING:
    from ..io.computed import Array

HELD = 1 << 19
"""Numbers of one series that are kept to be sorted."""

BINS = 1 << 16
"""Bins of an interval that holds more than that."""

SHARE = 256
"""One number of so many is in a sample, of tensors above `WHOLE`."""

WHOLE = 1 << 12
"""Tensors of at most so many entries are sampled whole."""

DEVIATIONS = 6.0
"""Standard deviations that the interval reaches to both sides of where the sample has the number."""

WIDER = 1.25
"""By how much the interval is wider to both sides where the sample is of a few targets: layers differ in size."""

LARGEST = 0x7FEFFFFFFFFFFFFF
"""The bits of the largest double."""


@dataclass(slots=True, eq=False)
class Selected:
    """One number of a series.

    Attributes:
        value: the k-th largest; infinite where k is 0, and 0 where k is at least the number of all.
        above: how many are larger.
        equal: how many are as large.
        total: how many there are.
    """

    value: float
    above: int
    equal: int
    total: int


@dataclass(slots=True, eq=False)
class Selection:
    """The search for one number of a series that is fed in pieces, the same ones in each round.

    Attributes:
        wanted: k, from how many numbers there are and how many of them are not zero.
        partial: whether samples are of a part of the series, which may be larger or smaller than the rest.
        found: the number; None as long as another round is needed.
    """

    wanted: Callable[[int, int], int]
    partial: bool = False
    found: Selected | None = None
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
        """Before the first round: numbers drawn from `of` of them."""
        with self._lock:
            self._samples.append((values, of / max(values.size, 1)))

    def begin(self) -> None:
        """Begins a round."""
        import numpy as np

        if self._samples:
            self._guess()
        self._total = self._nonzero = self._above = self._inside = 0
        # Numbers that are all equal, such as the zeros of a sparse change, are counted alone.
        several = self._lo < self._hi
        self._values = [] if several and self._expected <= HELD else None
        self._bins = np.zeros(BINS, np.int64) if several and self._values is None else None

    def feed(self, values: Array) -> None:
        """More numbers, none of them negative."""
        import numpy as np

        lo, hi = _double(self._lo), _double(self._hi)
        larger = values > hi
        above = int(np.count_nonzero(larger))
        inside = values[(values >= lo) ^ larger] if above else values[values >= lo]
        bins = None
        if self._bins is not None:
            places = (inside.astype("<f8", copy=False).view("<u8") - np.uint64(self._lo)) >> np.uint64(self._shift)
            bins = np.bincount(places.astype(np.int64), minlength=BINS)
        nonzero = int(np.count_nonzero(values))
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
        """Ends a round: the number is found, or the next interval."""
        import numpy as np

        k = min(self.wanted(self._total, self._nonzero), self._total)
        if k <= 0:
            self.found = Selected(math.inf, 0, 0, self._total)
        elif k <= self._above:
            self._interval(self._hi + 1, LARGEST, math.inf)
        elif k > self._above + self._inside:
            self._interval(0, self._lo - 1, math.inf)
        elif self._lo == self._hi:
            self.found = Selected(_double(self._lo), self._above, self._inside, self._total)
        elif self._values is not None:
            inside = np.concatenate(self._values)
            place = inside.size - (k - self._above)
            value = float(np.partition(inside, place)[place])
            above = self._above + int(np.count_nonzero(inside > value))
            self.found = Selected(value, above, int(np.count_nonzero(inside == value)), self._total)
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
        if lo > hi:  # An infinity is above all intervals, and a NaN in none.
            raise too_large()
        self._lo, self._hi, self._expected = lo, hi, expected

    def _guess(self) -> None:
        """The interval, from a sample of pieces in which a number stands for as many as the piece has a number."""
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


def settle(selections: Any, once: Callable[[], Any]) -> None:
    """Calls `once`, which feeds all numbers, until every selection has found its number."""
    while open_ := [each for each in selections if each.found is None]:
        for each in open_:
            each.begin()
        once()
        for each in open_:
            each.end()
