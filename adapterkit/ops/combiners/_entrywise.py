"""Base classes of combiners that work on single entries: they drop entries, elect signs, and sum the kept entries."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...native import loops
from ..blocks import Blocks
from ._combiner import Combiner, parameter, whole

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta

    Formula = Callable[[Array, slice], Array]
    Mask = Callable[[Array, slice], tuple[Array | None, Array | float]]

# Drop entries of changes at random, in place, in a compiled loop. `by_numpy` below does the same with numpy.
#
# With numpy, DELLA takes 4.5 s of processor time for eight changes of 4096 x 4096. Most of this time goes into sorting
# rows and drawing random numbers, and numpy needs several passes over whole arrays for both. The compiled loop does all
# steps row by row, and computes the same bits as numpy.


@dataclass(frozen=True, slots=True)
class Chance:
    """The probability that an entry of one change is kept.

    Attributes:
        least: the probability for the entry with the smallest magnitude in a row. If `spread` is 0, every entry has
            this probability.
        spread: the probability for the entry with the largest magnitude in a row, minus `least`.
    """

    least: float
    spread: float = 0.0


def compiled_drop(
    chances: Sequence[Chance | None], at: FormulaContext, inverse: bool
) -> Callable[[Array, slice], Array] | None:
    """Return a function that drops entries of a block in place; None if the compiled library is not available.

    Args:
        chances: for each change, the probability that an entry is kept; None for a change whose entries are all kept.
        at: the context of the formula, which has the keys of the random numbers.
        inverse: whether each kept entry is divided by the probability that it is kept.

    Returns:
        a function of (changes `[T, rows, columns]`, slice that selects these rows of the tensor). It modifies the
        changes and returns them.
    """
    library = loops()
    if library is None:
        return None
    drop = library.adapterkit_drop
    drawn = [(t, chance, at.key(t)) for t, chance in enumerate(chances) if chance is not None]

    def dropped(changes: Array, rows: slice) -> Array:
        _, count, columns = changes.shape
        for t, chance, key in drawn:
            D = changes[t]
            slope = chance.spread / max(columns - 1, 1)
            # An entry's position in the whole tensor determines its random number, so the result does not depend on the
            # sizes of blocks.
            if drop(_pointer(D), count, columns, key, rows.start * columns, chance.least, slope, inverse):
                raise MemoryError
        return changes

    return dropped


def _pointer(D: Array) -> ctypes.c_void_p:
    import numpy as np

    assert D.dtype == np.float64
    assert D.flags.c_contiguous
    return ctypes.c_void_p(D.ctypes.data)


# The base classes.


COUNTS = ("reference", "floor", "at_least_one")
SIGNS = ("none", "total", "frequency")
DENOMINATORS = ("none", "count", "weights")
RESCALES = ("none", "inverse", "norm")

SIGN = (
    "how the sign of each entry is elected: by the sum of the adapters' entries (total), "
    "by the number of adapters with each sign (frequency), or not at all (none)"
)
WEIGHTED_VOTE = "whether the adapters' weights count in the election of signs"
ZERO_SIGNS = ("+", "majority")
ZERO_SIGN = "the sign of an entry whose votes cancel: positive (+), or the sign elected for most entries (majority)"
DENOMINATOR = (
    "the divisor of each entry: the number of adapters with the elected sign (count), the sum of their weights "
    "(weights), or 1 (none); with sign=none, count and weights include all adapters"
)
DENSITY = "share of the entries to keep"
SCALE = "factor by which the result is multiplied (lambda)"
KEPT = (
    "how many of n entries are kept if the density is p: int(p n) + 1 (reference), int(p n) (floor), "
    "or int(p n) but at least 1 (at_least_one)"
)
RESCALE = (
    "how the kept entries are scaled: divided by the probability that they are kept (inverse), "
    "or so that the change's L1 norm is the same as before dropping (norm)"
)


class Entrywise(Combiner):
    """Combiners that work on single entries. Their formula gets the changes of a tensor in blocks of rows."""

    scale: float = parameter(1.0, SCALE)

    @property
    def dense(self) -> bool:
        return True

    @abstractmethod
    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        """Return a function that computes one block of the result from one block of the changes.

        Args:
            blocks: the changes. If the formula needs statistics of the whole tensor, this method iterates over `blocks`
                to compute them.
            weights: for each change, the weight of its adapter in the formula, `[T]`.
            at: the context of the formula.

        Returns:
            a function of (changes `[T, rows, columns]`, slice that selects these rows of the tensor). It may modify the
            changes. It is called once per block, from the first block to the last.
        """

    def count(self, blocks: Blocks, weights: Array, at: FormulaContext) -> None:
        """Add the changes of a tensor to `at.census`, for formulas that need statistics of whole adapters."""

    def rows(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Iterator[tuple[slice, Array]]:
        """Yield (slice of rows, result in these rows), block by block."""
        compute_rows = self.formula(blocks, weights, at)
        for rows, changes in blocks:
            yield rows, compute_rows(changes, rows)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        return whole(self._whole(Blocks(deltas), weights, at))

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        vector: Array = self._whole(Blocks.of(changes), weights, at)[0]
        return vector

    def _whole(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        result = np.zeros(blocks.shape)
        if at.census.counting:
            self.count(blocks, weights, at)
            return result
        for rows, block in self.rows(blocks, weights, at):
            result[rows] = block
        return result


class Sparse(Entrywise):
    """Combiners that drop entries: lambda * sum_t w_t M_t S(D_t) / denominator.

    S keeps the entries that the subclass's method `mask` selects, and scales them according to `rescale`. M_t is 1 for
    entries with the elected sign, else 0; without an election of signs, M_t is 1 for all entries.
    """

    sign: str = parameter("none", SIGN, among=SIGNS)
    weighted_vote: bool = parameter(False, WEIGHTED_VOTE)
    zero_sign: str = parameter("+", ZERO_SIGN, among=ZERO_SIGNS)
    denominator: str = parameter("none", DENOMINATOR, among=DENOMINATORS)

    @abstractmethod
    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        """Return a function that selects the entries to keep.

        Returns:
            a function of (changes `[T, rows, columns]`, slice that selects these rows of the tensor). It returns (mask,
            probability). The mask has the shape of the changes; None keeps all entries. The second value is the
            probability that an entry is kept; it is 1 if the mask is not random.
        """

    def chances(self, at: FormulaContext) -> Sequence[Chance | None] | None:
        """Return a list with one `Chance` per change, or None if the mask is not random.

        In the list, None stands for a change whose entries are all kept.
        """
        return None

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        kept = self._kept(blocks, at)

        def majority() -> int:
            return at.census.majority if self.counts else -1 if self._signs(blocks, weights, at) < 0 else 1

        return lambda changes, rows: self._fused(kept(changes, rows), weights, majority)

    def count(self, blocks: Blocks, weights: Array, at: FormulaContext) -> None:
        if at.census.voting:
            at.census.add_votes(self._signs(blocks, weights, at))

    def _kept(self, blocks: Blocks, at: FormulaContext) -> Formula:
        """Return a function that drops entries of a block and scales the kept entries, in place."""
        import numpy as np

        mask, how, chances = self.mask(blocks, at), getattr(self, "rescale", "none"), self.chances(at)

        def by_numpy(changes: Array, rows: slice) -> Array:
            chosen, chance = mask(changes, rows)
            if chosen is None:
                return changes
            changes *= chosen
            if how == "inverse":
                changes /= np.maximum(chance, np.finfo(float).tiny)
            return changes

        compiled = None if chances is None else compiled_drop(chances, at, how == "inverse")
        kept = compiled or by_numpy
        if how != "norm":
            return kept
        # Scaling needs the norms of the whole tensor, so entries are dropped from every block twice: first to compute
        # the norms, then to return the kept entries. Random masks depend only on the seed and on the positions of the
        # entries, so both times the same entries are dropped.
        before, after = np.zeros(blocks.count), np.zeros(blocks.count)
        for rows, changes in blocks:
            before += np.abs(changes).sum((1, 2))
            after += np.abs(kept(changes, rows)).sum((1, 2))
        both = (before > TINY) & (after > TINY)
        factors = np.where(both, before / np.where(both, after, 1.0), 1.0)[:, None, None]
        return lambda changes, rows: kept(changes, rows) * factors

    def _votes(self, kept: Array, weights: Array) -> Array:
        """Return an array whose signs are the elected signs; an element is zero if the votes for this entry cancel."""
        import numpy as np

        if self.sign == "total":
            return np.asarray(np.tensordot(weights, kept, 1) if self.weighted_vote else kept.sum(0))
        signs = (kept > 0).astype(np.int8) - (kept < 0)
        return np.asarray(np.tensordot(np.sign(weights), signs, 1) if self.weighted_vote else signs.sum(0, np.int32))

    def _signs(self, blocks: Blocks, weights: Array, at: FormulaContext) -> int:
        """Return the sum of the elected signs (1, 0 or -1) over all entries of a tensor."""
        import numpy as np

        kept, total = self._kept(blocks, at), 0
        for rows, changes in blocks:
            votes = self._votes(kept(changes, rows), weights)
            total += int(np.count_nonzero(votes > 0)) - int(np.count_nonzero(votes < 0))
        return total

    def _fused(self, kept: Array, weights: Array, majority: Callable[[], int]) -> Array:
        """Return the weighted sum of the kept entries that have the elected sign, divided by the denominator."""
        import numpy as np

        if self.sign == "none":
            # Without an election of signs, the denominator includes an adapter even if its entry was dropped, because
            # mergekit divides by the sum of all weights.
            divisor = {"none": 1.0, "count": float(len(kept)), "weights": float(weights.sum())}[self.denominator]
            return np.asarray(self.scale * np.tensordot(weights, kept, 1) / (divisor or 1.0))
        votes = self._votes(kept, weights)
        elected = np.where(votes >= 0, 1.0, -1.0)
        if self.zero_sign == "majority":
            # Compute the majority sign only if the votes for a kept entry cancel, because computing it takes another
            # pass over the tensor, or over all targets. An entry that no change keeps is zero with either sign.
            tied = (votes == 0) & kept.any(0)
            if tied.any():
                elected[tied] = majority()
        # After this multiplication, entries with the elected sign are positive. The multiplication is exact, because
        # `elected` contains only 1 and -1.
        along = kept * elected
        if self.weighted_vote:
            along *= np.sign(weights)[:, None, None]
        agree = along > 0
        np.maximum(along, 0.0, out=along)
        total = np.tensordot(np.abs(weights) if self.weighted_vote else weights, along, 1)
        total *= elected
        total *= self.scale
        if self.denominator == "none":
            return np.asarray(total)
        kind = np.uint8 if len(agree) < 256 else np.int32
        below = agree.sum(0, kind) if self.denominator == "count" else np.tensordot(weights, agree, 1)
        return np.asarray(total / np.where(below == 0, 1, below))


def count_of(density: float, total: int, how: str) -> int:
    """Return how many of `total` entries are kept if the density is `density`; `how` is one of `COUNTS`."""
    if density >= 1:
        return total
    if how == "reference":
        return min(int(density * total) + 1, total)
    return max(int(density * total), 1 if how == "at_least_one" and density > 0 else 0)


def largest(D: Array, kept: int) -> Array:
    """Return a mask of the `kept` largest magnitudes, including all entries that equal the smallest kept magnitude."""
    import numpy as np

    if kept <= 0:
        return np.zeros(D.shape, bool)
    if kept >= D.size:
        return np.ones(D.shape, bool)
    sizes = np.abs(D)
    chosen: Array = sizes >= np.partition(sizes.ravel(), D.size - kept)[D.size - kept]
    return chosen


def rescaled(D: Array, mask: Array, chance: Array | float, how: str) -> Array:
    """Set the entries of D outside the mask to 0, and scale the other entries according to `how`.

    `inverse` preserves the expected value of each entry, `norm` preserves the L1 norm, and `none` does not scale.
    """
    import numpy as np

    kept = D * mask
    if how == "inverse":
        return kept / np.where(mask, chance, 1.0)
    if how == "norm":
        before, after = np.abs(D).sum(), np.abs(kept).sum()
        return kept * (before / after) if before > TINY and after > TINY else kept
    return kept


TINY = 1e-7
"""A change whose L1 norm is below this number is not rescaled."""


def thresholds(blocks: Blocks, densities: Sequence[float], how: str) -> Array:
    """For each change of a tensor, return the smallest magnitude of the entries to keep, `[T, 1, 1]`."""
    import numpy as np

    wanted = [lambda total, _, density=density: count_of(density, total, how) for density in densities]
    selections = blocks.select(np.abs, wanted)
    return np.array([each.value for each in selections])[:, None, None]


def ranks(sizes: Array) -> Array:
    """Return the rank of each magnitude within its row, `[rows, columns]`, 0 for the smallest.

    Magnitudes whose relative difference is below 2^-40 count as equal, and are ranked in the order of their columns.
    """
    import numpy as np

    rows, columns = sizes.shape
    # Positive doubles keep their order if their bits are read as integers. The lowest bits are replaced by the column
    # number, so the sorted integers also contain the permutation. This takes a third of the time of argsort.
    low = np.uint64((1 << max(columns - 1, 1).bit_length()) - 1)
    keys = np.ascontiguousarray(sizes, "<f8").view("<u8") & ~low
    keys |= np.arange(columns, dtype=np.uint64)
    keys.sort(-1)
    keys &= low
    keys += (np.arange(rows, dtype=np.uint64) * np.uint64(columns))[:, None]
    place = np.empty(sizes.size, np.int64)
    place[keys.reshape(-1).view(np.int64)] = np.tile(np.arange(columns), rows)
    return place.reshape(sizes.shape)


class Scaled(Combiner):
    """A combiner with the parameter `scale`.

    A subclass must multiply the result of `matrix` by `scale`. For biases, the method `vector` of this class does so.
    """

    scale: float = parameter(1.0, SCALE)

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        return self.scale * super().vector(changes, weights, at)
