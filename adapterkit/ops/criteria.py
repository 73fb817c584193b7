"""How much of a change is kept: by rank, by share of its energy, or by error; of each weight, or of all together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..tensors.computed import Array

SCOPES = ("target", "all")


@dataclass(frozen=True, slots=True)
class Criterion:
    """One of the four, or none: then everything is kept.

    Attributes:
        rank: singular values to keep.
        energy: share of the squared Frobenius norm to keep, up to 1.
        error: relative Frobenius norm of what may be left out.
        frobenius: Frobenius norm of what may be left out.
        scope: `target`: each weight for itself. `all`: largest singular values first, wherever they are; `rank` is
            then that of the average weight, and the other three are of the adapter as one.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    frobenius: float | None = None
    scope: str = "target"

    def check(self, *, needed: bool = True) -> None:
        """Checks the values.

        Raises:
            UsageError: not exactly one of the four is given, or it is out of its range.
        """
        given = self.record()
        if len(given) > 1 or (needed and not given):
            said = " and ".join(given) or "none"
            raise UsageError(f"one of rank, energy, error and frobenius is needed, not {said}", cure="Choose one")
        if self.scope not in SCOPES:
            raise UsageError(f"unknown scope {self.scope!r}", cure=f"Known: {', '.join(SCOPES)}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(f"rank {self.rank} is not a whole number from 1", where="rank", cure="Choose another")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy} is not above 0 and up to 1", where="energy", cure="Choose another")
        for name in ("error", "frobenius"):
            value = given.get(name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} {value} is not a number from 0", where=name, cure="Choose another")

    def record(self) -> dict[str, Any]:
        """The one that was chosen, for a lineage."""
        named = {"rank": self.rank, "energy": self.energy, "error": self.error, "frobenius": self.frobenius}
        return {name: value for name, value in named.items() if value is not None}

    def keeps_all(self, small: int) -> bool:
        """Whether nothing of a matrix whose smaller side is `small` may be lost."""
        return (self.rank or 0) >= small or self.energy == 1 or 0 in (self.error, self.frobenius)

    def check_possible(self, most: int) -> None:
        """Refuses a rank that no weight can have.

        Raises:
            UsageError: the rank is above `most`, the largest that is possible.
        """
        if self.rank is not None and self.rank > most:
            why = f"rank {self.rank} of weights of rank {most} at most"
            raise UsageError(why, where="rank", cure=f"Choose a rank up to {most}")

    def counts(self, spectra: Sequence[Array], norms: Sequence[float]) -> list[int]:
        """How many singular values of each weight are kept, at least one each, or in scope `all` one overall.

        Args:
            spectra: singular values of each weight, largest first; all of them, or the first so many.
            norms: Frobenius norms of the weights' changes.
        """
        if self.scope == "target":
            return [self._count(S, norm, 1) for S, norm in zip(spectra, norms, strict=True)]
        import numpy as np

        pooled = np.concatenate(list(spectra))
        owner = np.repeat(np.arange(len(spectra)), [len(S) for S in spectra])
        order = np.argsort(-pooled, kind="stable")
        kept = owner[order[: self._count(pooled[order], math.hypot(*norms), len(spectra))]]
        return [int(count) for count in np.bincount(kept, minlength=len(spectra))]

    def reached(self, S: Array, norm: float) -> bool:
        """Whether the first singular values, which may not be all, are enough."""
        return len(S) >= self._count(S, norm, 1, beyond=1)

    def _count(self, S: Array, norm: float, weights: int, beyond: int = 0) -> int:
        """The smallest number of singular values that is enough; all of them, and `beyond`, where even they are not."""
        if self.rank is not None:
            return min(self.rank * weights, len(S) + beyond)
        limit = self._limit(norm)
        if limit is None:
            return len(S)
        enough = [i for i, left in enumerate(_left_out(S, norm)) if left <= limit and i]
        return enough[0] if enough else len(S) + beyond

    def _limit(self, norm: float) -> float | None:
        """The Frobenius norm that may be left out."""
        if self.energy is not None:
            return math.sqrt(1 - self.energy) * norm
        return self.frobenius if self.error is None else self.error * norm


def _left_out(S: Array, norm: float) -> list[float]:
    """The Frobenius norms of what is left out when 0, 1, ... singular values are kept."""
    import numpy as np

    squares = np.concatenate([S, [0.0]]) ** 2
    tails = np.cumsum(squares[::-1])[::-1]
    unseen = max(norm**2 - float(tails[0]), 0.0)
    # What rounding alone leaves of the difference is nothing.
    unseen = 0.0 if unseen <= 1e-14 * norm**2 else unseen
    return [math.sqrt(float(tail) + unseen) for tail in tails]
