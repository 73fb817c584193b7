"""Methods entry by entry: each change made sparse, signs put to the vote, what agrees summed or averaged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._changes import whole
from ._method import Method, parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At
    from ..lowering import Delta

BLOCK = 1 << 15
"""Entries looked at together: those of several adapters fit a core's cache."""

COUNTS = ("reference", "floor", "at_least_one")
SIGNS = ("none", "total", "frequency")
DENOMINATORS = ("none", "count", "weights")
RESCALES = ("none", "inverse", "norm")

SIGN = "how signs are elected: by the sum, or by how many there are"
WEIGHTED_VOTE = "whether weights count in the election"
ZERO_SIGNS = ("+", "majority")
ZERO_SIGN = "the sign of an entry whose votes cancel: positive, or that of most entries of its tensor"
DENOMINATOR = (
    "what a sum is divided by: the adapters that have the elected sign, or their weights; all if none is elected"
)
DENSITY = "share of the entries that are kept"
SCALE = "factor of the result, lambda"
KEPT = "how many entries a density p of n is: int(p n) + 1 (reference), int(p n) (floor), or that but 1 at least"
RESCALE = "what is kept is divided by its probability (inverse), or brought to the L1 norm it had (norm)"


class Entrywise(Method):
    """Methods that need whole matrices; the formula sees all changes of a tensor, `merged`."""

    scale: float = parameter(1.0, SCALE)

    @property
    def dense(self) -> bool:
        return True

    @abstractmethod
    def merged(self, changes: Array, weights: Array, at: At) -> Array:
        """Changes `[T, ...]`, which may be written over, to one, `[...]`."""

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: At) -> Delta:
        import numpy as np

        changes = np.empty((len(deltas), *deltas[0].shape))
        for D, delta in zip(changes, deltas, strict=True):
            D[...] = delta.dense()
        return whole(self.merged(changes, weights, at))

    def vector(self, changes: Array, weights: Array, at: At) -> Array:
        return self.merged(changes, weights, at)


class Sparse(Entrywise):
    """lambda * sum_t w_t M_t S(D_t), over a denominator if any; M_t is 1 where an entry has the elected sign.

    S is the formula of a subclass, `sparse`; it is given, and gives, one change.
    """

    sign: str = parameter("none", SIGN, among=SIGNS)
    weighted_vote: bool = parameter(False, WEIGHTED_VOTE)
    zero_sign: str = parameter("+", ZERO_SIGN, among=ZERO_SIGNS)
    denominator: str = parameter("none", DENOMINATOR, among=DENOMINATORS)

    @abstractmethod
    def sparse(self, D: Array, t: int, at: At) -> Array:
        """The change of present adapter t with most entries set to zero."""

    def merged(self, changes: Array, weights: Array, at: At) -> Array:
        import numpy as np

        for t, D in enumerate(changes):
            changes[t] = self.sparse(D, t, at)
        kept = changes.reshape(len(changes), -1)
        elected = self._elected(kept, weights)
        result = np.empty(kept.shape[1])
        for start in range(0, len(result), BLOCK):
            span = slice(start, start + BLOCK)
            result[span] = self._fused(kept[:, span], None if elected is None else elected[span], weights[:, None])
        return result.reshape(changes.shape[1:])

    def _elected(self, kept: Array, weights: Array) -> Array | None:
        """The sign of each entry, 1 or -1; None where there is no election."""
        import numpy as np

        if self.sign == "none":
            return None
        elected = np.empty(kept.shape[1], np.int8)
        for start in range(0, len(elected), BLOCK):
            span = slice(start, start + BLOCK)
            votes = weights[:, None] * kept[:, span] if self.weighted_vote else kept[:, span]
            elected[span] = np.sign((votes if self.sign == "total" else np.sign(votes)).sum(0))
        majority = np.sign(int(elected.sum(dtype=np.int64))) if self.zero_sign == "majority" else 1
        elected[elected == 0] = majority or 1
        return elected

    def _fused(self, kept: Array, elected: Array | None, w: Array) -> Array:
        """The sum over what agrees, over the denominator."""
        import numpy as np

        # Without an election all agree, also where an entry was dropped: mergekit divides by the sum of all weights.
        agree = np.ones(kept.shape, bool)
        if elected is not None:
            agree = np.sign(w * kept if self.weighted_vote else kept) == elected
        total = self.scale * (w * kept * agree).sum(0)
        if self.denominator == "none":
            return np.asarray(total)
        below = (agree * (1.0 if self.denominator == "count" else w)).sum(0)
        return np.asarray(total / np.where(below == 0, 1.0, below))


def count_of(density: float, total: int, how: str) -> int:
    """How many of `total` entries a density keeps."""
    if density >= 1:
        return total
    if how == "reference":
        return min(int(density * total) + 1, total)
    return max(int(density * total), 1 if how == "at_least_one" and density > 0 else 0)


def largest(D: Array, kept: int) -> Array:
    """Which entries are among the `kept` largest magnitudes; those as large as the smallest of them, too."""
    import numpy as np

    if kept <= 0:
        return np.zeros(D.shape, bool)
    if kept >= D.size:
        return np.ones(D.shape, bool)
    sizes = np.abs(D)
    chosen: Array = sizes >= np.partition(sizes.ravel(), D.size - kept)[D.size - kept]
    return chosen


def rescaled(D: Array, mask: Array, chance: Array | float, how: str) -> Array:
    """D where the mask is set, which it is by `chance`, scaled so that its mean, or its L1 norm, stays."""
    import numpy as np

    kept = D * mask
    if how == "inverse":
        return kept / np.where(mask, chance, 1.0)
    if how == "norm":
        before, after = np.abs(D).sum(), np.abs(kept).sum()
        return kept * (before / after) if before > TINY and after > TINY else kept
    return kept


TINY = 1e-7
"""L1 norms below this are not brought to one another."""
