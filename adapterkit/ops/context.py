"""The context in which a combiner's formula runs: the target, random numbers, and statistics over all targets.

A `Census` collects statistics over all targets, such as thresholds, before any result is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import PASS_BASE, UsageError
from .blocks import Selection, settle

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..io.computed import Array
    from ..io.lazy import Shape
    from .blocks import Blocks


class Census:
    """Statistics of each adapter's changes over all targets.

    Attributes:
        counting: whether formulas currently run only to collect statistics. If so, their results are ignored.
        partial: whether the first estimate of a threshold uses samples from only some of the targets.
        majority: the more frequent sign, 1 or -1, among the signs that are elected for the entries of all targets.
            It is computed when it is first read.
    """

    def __init__(self) -> None:
        self.counting = False
        self.partial = False
        self._selections: dict[Any, Selection] = {}
        self._sums: dict[Any, float] = {}
        self._sampling = self._summing = False
        self._lock = Lock()
        self._vote: Callable[[Census], None] | None = None
        self._votes: int | None = None
        self._majority: int | None = None

    def run(self, once: Callable[[bool], None], stages: int = 1) -> None:
        """Run the formula at the targets, to collect the statistics before results are computed.

        Args:
            once: a function that runs the formula at a few targets if its argument is True, or at all targets if its
                argument is False. It is called with False about twice per stage.
            stages: the number of threshold searches. They run one after another, because each search uses the result
                of the previous search. 0 if only sums are needed.
        """
        self.counting = True
        for _ in range(stages):
            self._sampling = True
            once(True)
            self._sampling = False
            settle(list(self._selections.values()), lambda: once(False))
        if not stages:
            self._summing = True
            once(False)
            self._summing = False
        self.counting = False

    def count(
        self,
        series: Sequence[Hashable],
        blocks: Blocks,
        wanted: Sequence[Callable[[int, int], int]],
        key: Callable[[Array], Array] | None = None,
    ) -> None:
        """Add the values of one weight to each series. A series' threshold is computed from the values of all weights.

        Args:
            series: the names of the series, such as the indices of the adapters.
            blocks: the changes that the adapters make to the weight, split into blocks.
            wanted: for each series, a function of (number of values, number of nonzero values) that returns how many of
                the largest values to keep.
            key: a function that maps changes `[T, ...]` to values `[number of series, ...]`; default: the magnitudes of
                the changes, with one series per adapter.
        """
        import numpy as np

        key = np.abs if key is None else key
        with self._lock:
            for name, kept in zip(series, wanted, strict=True):
                self._selections.setdefault(name, Selection(kept, partial=self.partial))
        searched = [(i, self._selections[name]) for i, name in enumerate(series)]
        searched = [(i, selection) for i, selection in searched if selection.selected is None]
        if self._sampling:
            drawn = key(blocks.sample()) if searched else None
            for i, selection in searched:
                selection.sample(drawn[i].reshape(-1), blocks.size)  # type: ignore[index]
            return
        for _, changes in blocks if searched else ():
            values = key(changes)
            for i, selection in searched:
                selection.feed(np.ascontiguousarray(values[i]).reshape(-1))

    def threshold(self, series: Hashable) -> float:
        """Return the smallest kept value of a series; infinity if no value is kept."""
        value = self._selections[series].selected
        assert value is not None
        return value.value

    def knows(self, series: Hashable) -> bool:
        """Whether the threshold of a series is known from an earlier stage."""
        return series in self._selections and self._selections[series].selected is not None

    def add(self, name: Hashable, value: float) -> None:
        """Add `value` to the sum called `name`. If sums are not being collected, do nothing.

        Each sum covers all targets.
        """
        if self._summing:
            with self._lock:
                self._sums[name] = self._sums.get(name, 0.0) + value

    def sum_of(self, name: Hashable) -> float:
        """Return the sum called `name`; 0 if no value was added to this sum."""
        return self._sums.get(name, 0.0)

    def votes_by(self, vote: Callable[[Census], None]) -> None:
        """Set the function that runs the formula at all targets to collect the votes for `majority`."""
        self._vote = vote

    @property
    def voting(self) -> bool:
        """Whether the current run of the formulas only collects votes for `majority`."""
        return self._votes is not None

    def add_votes(self, signs: int) -> None:
        """Count one weight's votes for `majority`: `signs` is the sum of the signs elected for the weight's entries."""
        with self._lock:
            assert self._votes is not None
            self._votes += signs

    @property
    def majority(self) -> int:
        with self._lock:
            if self._majority is None:
                assert self._vote is not None
                # The vote uses thresholds that are already computed. One thread runs the vote; the others wait for the
                # result.
                poll = Census()
                poll._selections, poll._votes, poll.counting = self._selections, 0, True
                self._vote(poll)
                self._majority = -1 if poll._votes < 0 else 1
            return self._majority


PER_COUNT = 8
"""The number of 32-bit words that Philox4x64 generates from one counter value."""


def _no_base() -> Array:
    raise UsageError("the formula needs the base's weights", where="base", cure=PASS_BASE)


@dataclass(frozen=True, slots=True, eq=False)
class FormulaContext:
    """The context of a formula for one weight or one bias.

    Attributes:
        target: the target.
        shape: the shape of the weight, `[out, in, *k]`.
        present: the adapters that change this weight or bias, as indices into the list of all adapters.
        part: `weight` or `bias`; for stacked experts, followed by the expert's index, such as `weight 3`.
        seed: the seed of all random numbers.
        overrides: for each adapter in the list of all adapters, the parameters that apply to this adapter only.
        scalings: for each adapter in `present`, the scaling of its update at this target; None if the adapter has
            several updates at this target, or its update has no scaling.
        census: statistics over all targets. While the statistics are collected, `census.counting` is true.
        asks: the caller's function `data`, for methods that need data.
        depth: the depth of the target, 0 in the first layer and 1 in the last; None outside numbered layers.
        learned: the learned coefficients of this target, for methods that learn coefficients.
        base: a function that returns the base's weight `[out, in * k]` or bias `[out]`.
    """

    target: Target
    shape: Shape
    present: tuple[int, ...]
    part: str = "weight"
    seed: int = 0
    overrides: Sequence[Mapping[str, Any]] = ()
    scalings: tuple[float | None, ...] = ()
    census: Census = field(default_factory=Census)
    asks: Callable[..., object] | None = None
    depth: float | None = None
    learned: Array | None = None
    base: Callable[[], Array] = _no_base

    def each(self, method: object, name: str) -> list[Any]:
        """Return the value of the parameter `name` for each adapter in `present`."""
        overrides = [self.overrides[t] if self.overrides else {} for t in self.present]
        return [values.get(name, getattr(method, name)) for values in overrides]

    def uniform(self, t: int, shape: tuple[int, ...], first: int = 0) -> Array:
        """Draw random numbers in [0, 1) for the adapter with index `t` in `present`.

        Each adapter has its own stream of numbers. Number n of a stream depends only on n and on the adapter's `key`.

        Philox4x64-10 generates 64-bit values from the key. Each value is split into two 32-bit words, the low half
        first. Number n is word n, divided by 2^32.

        Args:
            t: the index of the adapter in `present`.
            shape: the shape of the result.
            first: the index n of the first number to return.
        """
        import math

        import numpy as np

        count, begin = math.prod(shape), first // PER_COUNT
        skipped = first - begin * PER_COUNT
        # Use a counter-based generator, because a block may start at any index n. numpy's `Philox` takes 2 ns per
        # number; the same algorithm written with numpy arrays takes ten times as long.
        stream = np.random.Philox(key=self.key(t), counter=begin)
        drawn = stream.random_raw((skipped + count + 1) // 2).astype("<u8", copy=False).view("<u4")
        return (drawn[skipped : skipped + count] * 2.0**-32).reshape(shape)

    def key(self, t: int) -> int:
        """Return Philox's 64-bit key for adapter `present[t]`: a hash of seed, target, part and the adapter's index."""
        words = f"{self.seed}\n{self.target}\n{self.part}\n{self.present[t]}"
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
