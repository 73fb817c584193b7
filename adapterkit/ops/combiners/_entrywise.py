"""Base classes of entrywise combiners: make changes sparse, elect signs, sum or average the entries that agree."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..blocks import Blocks
from ..dropping import compiled_drop
from ._changes import whole
from ._combiner import Combiner, parameter

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..dropping import Chance
    from ..lowering import Delta

    Formula = Callable[[Array, slice], Array]
    Mask = Callable[[Array, slice], tuple[Array | None, Array | float]]

COUNTS = ("reference", "floor", "at_least_one")
SIGNS = ("none", "total", "frequency")
DENOMINATORS = ("none", "count", "weights")
RESCALES = ("none", "inverse", "norm")

SIGN = "how the signs are elected: by the sum of the entries, or by the number of entries of each sign"
WEIGHTED_VOTE = "whether the weights count in the election"
ZERO_SIGNS = ("+", "majority")
ZERO_SIGN = "the sign of an entry whose votes cancel: positive, or the sign of most entries in its tensor"
DENOMINATOR = (
    "the divisor of a sum: the number of adapters with the elected sign, or their weights' sum; all if none has it"
)
DENSITY = "share of the entries to keep"
SCALE = "factor of the result, lambda"
KEPT = "how many of n entries a density p keeps: int(p n) + 1 (reference), int(p n) (floor), or int(p n) but at least 1"
RESCALE = "how kept entries are scaled: divided by their probability (inverse), or to the L1 norm from before (norm)"


class Entrywise(Combiner):
    """Combiners that work on single entries: the formula gets the changes of a tensor in blocks of rows."""

    scale: float = parameter(1.0, SCALE)

    @property
    def dense(self) -> bool:
        return True

    @abstractmethod
    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        """Return the function that computes one block of the result from a block of the changes.

        Args:
            blocks: the changes; a formula that needs statistics of the whole tensor reads them before it returns.
            weights: one weight per change.
            at: the place of the tensor.

        Returns:
            a function of changes `[T, rows, columns]` and of the slice of their rows. It may modify the changes, and is
            called for one block after another, in order.
        """

    def count(self, blocks: Blocks, weights: Array, at: FormulaContext) -> None:
        """Feed `at.census`, for formulas that need statistics of whole adapters."""

    def rows(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Iterator[tuple[slice, Array]]:
        """Yield the result, a block of rows at a time."""
        made = self.formula(blocks, weights, at)
        for rows, changes in blocks:
            yield rows, made(changes, rows)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        return whole(self._whole(Blocks(deltas), weights, at))

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        made: Array = self._whole(Blocks.of(changes), weights, at)[0]
        return made

    def _whole(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        result = np.zeros(blocks.shape)
        if at.census.counting:
            self.count(blocks, weights, at)
            return result
        for rows, made in self.rows(blocks, weights, at):
            result[rows] = made
        return result


class Sparse(Entrywise):
    """lambda * sum_t w_t M_t S(D_t) / denominator; M_t is 1 for entries with the elected sign, else 0.

    S keeps the entries of `mask`, which a subclass defines, and scales them as `rescale` says.
    """

    sign: str = parameter("none", SIGN, among=SIGNS)
    weighted_vote: bool = parameter(False, WEIGHTED_VOTE)
    zero_sign: str = parameter("+", ZERO_SIGN, among=ZERO_SIGNS)
    denominator: str = parameter("none", DENOMINATOR, among=DENOMINATORS)

    @abstractmethod
    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        """Return the function that selects the entries to keep.

        Returns:
            a function of changes `[T, rows, columns]` and of the slice of their rows. It returns a mask of that shape
            (None keeps all entries), and the probability that an entry is kept (1 if the choice is not random).
        """

    def chances(self, at: FormulaContext) -> Sequence[Chance | None] | None:
        """Return each change's probability if the mask is purely random, or None for other masks."""
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
        """Return the function that makes a block of the changes sparse and scales kept entries, in place."""
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
        # The norms of a whole tensor are known only after a pass over it, so every block is masked twice. Random masks
        # depend on seed and position alone, and are the same in both passes.
        before, after = np.zeros(blocks.count), np.zeros(blocks.count)
        for rows, changes in blocks:
            before += np.abs(changes).sum((1, 2))
            after += np.abs(kept(changes, rows)).sum((1, 2))
        both = (before > TINY) & (after > TINY)
        factors = np.where(both, before / np.where(both, after, 1.0), 1.0)[:, None, None]
        return lambda changes, rows: kept(changes, rows) * factors

    def _votes(self, kept: Array, weights: Array) -> Array:
        """Return, for each entry, a number with the elected sign; zero if the votes cancel."""
        import numpy as np

        if self.sign == "total":
            return np.asarray(np.tensordot(weights, kept, 1) if self.weighted_vote else kept.sum(0))
        signs = (kept > 0).astype(np.int8) - (kept < 0)
        return np.asarray(np.tensordot(np.sign(weights), signs, 1) if self.weighted_vote else signs.sum(0, np.int32))

    def _signs(self, blocks: Blocks, weights: Array, at: FormulaContext) -> int:
        """Return the sum of the elected signs over all entries of a tensor."""
        import numpy as np

        kept, total = self._kept(blocks, at), 0
        for rows, changes in blocks:
            votes = self._votes(kept(changes, rows), weights)
            total += int(np.count_nonzero(votes > 0)) - int(np.count_nonzero(votes < 0))
        return total

    def _fused(self, kept: Array, weights: Array, majority: Callable[[], int]) -> Array:
        """Return the sum of the entries with the elected sign, divided by the denominator."""
        import numpy as np

        if self.sign == "none":
            # Without an election, dropped entries also count as agreeing, because mergekit divides by the sum of all
            # weights.
            divisor = {"none": 1.0, "count": float(len(kept)), "weights": float(weights.sum())}[self.denominator]
            return np.asarray(self.scale * np.tensordot(weights, kept, 1) / (divisor or 1.0))
        votes = self._votes(kept, weights)
        elected = np.where(votes >= 0, 1.0, -1.0)
        if self.zero_sign == "majority":
            # Computing the majority runs the formula at all targets. An entry that no change keeps is zero with any
            # sign, so the majority is needed only if kept entries cancel exactly.
            tied = (votes == 0) & kept.any(0)
            if tied.any():
                elected[tied] = majority()
        # After this product an entry that agrees is positive. The product is exact, because `elected` holds only signs.
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
    """Return how many of `total` entries a density keeps; `how` is one of `COUNTS`."""
    if density >= 1:
        return total
    if how == "reference":
        return min(int(density * total) + 1, total)
    return max(int(density * total), 1 if how == "at_least_one" and density > 0 else 0)


def largest(D: Array, kept: int) -> Array:
    """Return a mask of the `kept` largest magnitudes, and of all entries that equal the smallest of these."""
    import numpy as np

    if kept <= 0:
        return np.zeros(D.shape, bool)
    if kept >= D.size:
        return np.ones(D.shape, bool)
    sizes = np.abs(D)
    chosen: Array = sizes >= np.partition(sizes.ravel(), D.size - kept)[D.size - kept]
    return chosen


def rescaled(D: Array, mask: Array, chance: Array | float, how: str) -> Array:
    """Return the entries of D in the mask, scaled to keep the expected value (`inverse`) or the L1 norm (`norm`)."""
    import numpy as np

    kept = D * mask
    if how == "inverse":
        return kept / np.where(mask, chance, 1.0)
    if how == "norm":
        before, after = np.abs(D).sum(), np.abs(kept).sum()
        return kept * (before / after) if before > TINY and after > TINY else kept
    return kept


TINY = 1e-7
"""With an L1 norm below this, nothing is rescaled."""


def thresholds(blocks: Blocks, densities: Sequence[float], how: str) -> Array:
    """Return, for each change of a tensor, the smallest magnitude that the density keeps, `[T, 1, 1]`."""
    import numpy as np

    wanted = [lambda total, _, density=density: count_of(density, total, how) for density in densities]
    found = blocks.select(np.abs, wanted)
    return np.array([each.value for each in found])[:, None, None]


def ranks(sizes: Array) -> Array:
    """Return the rank of each magnitude within its row, `[rows, columns]`, 0 for the smallest.

    Magnitudes within 2^-40 of each other count as equal. Equal magnitudes are ranked in the order of their columns.
    """
    import numpy as np

    rows, columns = sizes.shape
    # The bits of positive doubles have the same order as the doubles. With the column number in the last bits, sorting
    # the integers also yields the permutation, in a third of the time of an argsort.
    low = np.uint64((1 << max(columns - 1, 1).bit_length()) - 1)
    keys = np.ascontiguousarray(sizes, "<f8").view("<u8") & ~low
    keys |= np.arange(columns, dtype=np.uint64)
    keys.sort(-1)
    keys &= low
    keys += (np.arange(rows, dtype=np.uint64) * np.uint64(columns))[:, None]
    place = np.empty(sizes.size, np.int64)
    place[keys.reshape(-1).view(np.int64)] = np.tile(np.arange(columns), rows)
    return place.reshape(sizes.shape)
