"""Choose how many singular values to keep: by a rank, a share of energy, an error, or one of kohya's rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..io.computed import Array

SCOPES = ("target", "all")
_ONE = "Give one of them, such as --rank N (rank=) or --energy SHARE (energy=)"
_RANK = "Give --rank N (rank=) of at least 1"

NAMES = "rank, energy, error, frobenius, sv_ratio, sv_cumulative and sv_fro"


@dataclass(frozen=True, slots=True)
class Criterion:
    """A criterion for how many singular values to keep. Without any field, it keeps all.

    Only one field may be set, except that `rank` may be set with one of kohya's rules; it is then an upper limit.

    Attributes:
        rank: the number of singular values to keep.
        energy: the share of the squared Frobenius norm to keep, up to 1.
        error: the largest Frobenius norm to drop, relative to the norm of the change.
        frobenius: the largest Frobenius norm to drop.
        sv_ratio: kohya's rule: keep singular values above the largest one divided by this number.
        sv_cumulative: kohya's rule: the least share of the sum of singular values to keep.
        sv_fro: kohya's rule: the least share of the Frobenius norm to keep; `energy` is its square.
        scope: `target`: apply the criterion to each weight separately. `all`: keep the largest singular values among
            all weights; `rank` is then the mean rank, and energy, error and frobenius apply to the whole adapter.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    frobenius: float | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None
    scope: str = "target"

    def check(self, *, needed: bool = True) -> None:
        """Check the values.

        Raises:
            UsageError: not exactly one criterion is given, or it is out of range.
        """
        given = self.record()
        chosen = [name for name in given if name != "rank" or not self._by_values]
        if len(chosen) > 1 or (needed and not given):
            said = " and ".join(chosen) or "none"
            raise UsageError(f"one of {NAMES} is needed, not {said}", cure=_ONE)
        if self._by_values and self.scope != "target":
            raise UsageError(f"{chosen[0]} applies to each target", where="scope", cure="Leave --scope (scope=) out")
        if self.sv_ratio is not None and not 1 <= self.sv_ratio < math.inf:
            why = f"sv_ratio {self.sv_ratio} is not a number from 1"
            raise UsageError(why, where="sv_ratio", cure="Choose another")
        for name in ("sv_cumulative", "sv_fro"):
            if name in given and not 0 < given[name] <= 1:
                raise UsageError(f"{name} {given[name]} is not above 0 and up to 1", where=name, cure="Choose another")
        if self.scope not in SCOPES:
            raise UsageError(f"unknown scope {self.scope!r}", cure=f"Known: {', '.join(SCOPES)}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(f"rank {self.rank} is not a whole number from 1", where="rank", cure=_RANK)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy} is not above 0 and up to 1", where="energy", cure="Choose another")
        for name in ("error", "frobenius"):
            value = given.get(name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} {value} is not a number from 0", where=name, cure="Choose another")

    def record(self) -> dict[str, float]:
        """Return the fields that are set, for a lineage."""
        named = {
            "rank": self.rank, "energy": self.energy, "error": self.error, "frobenius": self.frobenius,
            "sv_ratio": self.sv_ratio, "sv_cumulative": self.sv_cumulative, "sv_fro": self.sv_fro,
        }  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}

    @property
    def _by_values(self) -> bool:
        return any(value is not None for value in (self.sv_ratio, self.sv_cumulative, self.sv_fro))

    def keeps_all(self, small: int) -> bool:
        """Whether the criterion keeps all singular values of a matrix whose smaller side is `small`."""
        if self._by_values:
            return (self.rank or small) >= small and 1 in (self.sv_cumulative, self.sv_fro)
        return (self.rank or 0) >= small or self.energy == 1 or 0 in (self.error, self.frobenius)

    def check_possible(self, most: int) -> None:
        """Check that at least one weight is large enough for the rank.

        Raises:
            UsageError: the rank is larger than `most`, the largest possible rank.
        """
        if self.rank is not None and self.rank > most:
            why = f"the rank is {self.rank}, but the weights have at most rank {most}"
            raise UsageError(why, where="rank", cure=f"Choose a rank up to {most}")

    def counts(self, spectra: Sequence[Array], norms: Sequence[float]) -> list[int]:
        """Return how many singular values of each weight to keep.

        At least one is kept: of each weight in scope `target`, of one weight in scope `all`.

        Args:
            spectra: the singular values of each weight, or only the largest ones, largest first.
            norms: Frobenius norms of the weights' changes.
        """
        if self.scope == "target":
            return [self._count(S, norm, 1) for S, norm in zip(spectra, norms, strict=True)]
        import numpy as np

        pooled = np.concatenate(list(spectra))
        owner = np.repeat(np.arange(len(spectra)), [len(S) for S in spectra])
        # Use a stable sort, so that of several equal singular values every platform keeps the same.
        order = np.argsort(-pooled, kind="stable")
        kept = owner[order[: self._count(pooled[order], math.hypot(*norms), len(spectra))]]
        return [int(count) for count in np.bincount(kept, minlength=len(spectra))]

    def reached(self, S: Array, norm: float) -> bool:
        """Whether the known singular values, possibly not all, are enough to meet the criterion."""
        return len(S) >= self._count(S, norm, 1, beyond=1)

    def _count(self, S: Array, norm: float, weights: int, beyond: int = 0) -> int:
        """Return the smallest number of singular values that meets the criterion.

        If S is too short, return len(S) + `beyond`.
        """
        if self._by_values:
            count = self._of_values(S, norm, beyond)
            return count if self.rank is None else min(count, self.rank)
        if self.rank is not None:
            return min(self.rank * weights, len(S) + beyond)
        limit = self._limit(norm)
        if limit is None:
            return len(S)
        enough = [i for i, left in enumerate(_left_out(S, norm)) if left <= limit and i]
        return enough[0] if enough else len(S) + beyond

    def _of_values(self, S: Array, norm: float, beyond: int) -> int:
        """Return how many singular values kohya keeps, at least 1.

        If the number depends on values that S lacks, return len(S) + `beyond`.

        The rules are those of resize_lora.py in https://github.com/kohya-ss/sd-scripts.
        """
        import numpy as np

        if not len(S) or not S[0]:
            return min(1, len(S))
        if self.sv_ratio is not None:
            count = int((S[0] / self.sv_ratio < S).sum())
            return len(S) + beyond if count == len(S) else max(count, 1)
        if self.sv_cumulative is not None and beyond:
            return len(S) + beyond
        if self.sv_cumulative is not None:
            shares, least = S.cumsum() / S.sum(), self.sv_cumulative
        else:
            shares, least = (S * S).cumsum() / norm**2, self.sv_fro**2  # type: ignore[operator]
        return min(int(np.searchsorted(shares, least)) + 1, len(S) + beyond)

    def _limit(self, norm: float) -> float | None:
        """Return the largest Frobenius norm to drop."""
        if self.energy is not None:
            return math.sqrt(1 - self.energy) * norm
        return self.frobenius if self.error is None else self.error * norm


def _left_out(S: Array, norm: float) -> list[float]:
    """Return a list whose item i is the Frobenius norm that is dropped if i singular values are kept."""
    import numpy as np

    squares = np.concatenate([S, [0.0]]) ** 2
    tails = np.cumsum(squares[::-1])[::-1]
    unseen = max(norm**2 - float(tails[0]), 0.0)
    # Set a difference of squares to zero if it is only rounding noise; S then contains all singular values.
    unseen = 0.0 if unseen <= 1e-14 * norm**2 else unseen
    return [math.sqrt(float(tail) + unseen) for tail in tails]
