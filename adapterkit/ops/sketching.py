"""Compute a truncated SVD of a matrix, from a randomized sketch or exactly.

The sketch applies subspace iteration to random vectors (Halko, Martinsson and Tropp 2011,
https://doi.org/10.1137/090771806). The result is an orthonormal basis Q. The matrix D is approximated by Q Q^T D. To
show that the error is close to the smallest possible error, this module computes an upper bound for the sum of the
squares of D's k largest singular values. Let R = D - Q Q^T D, let r be the square of R's largest singular value, and
let s_1 .. s_k be the k largest singular values of Q^T D. The upper bound is s_1^2 + .. + s_k^2, plus the smaller of two
terms:

- k * r (Ky Fan 1949, for D^T D = (Q^T D)^T (Q^T D) + R^T R);
- the sum of max(r - s_i^2, 0) over i, plus the sum of the k largest singular values of R D^T Q (the same theorem
  for D D^T).

An upper bound for r is computed by applying powers of R^T R to random vectors (Dixon 1983,
https://doi.org/10.1137/0720053). The probability that the bound for r is too small is at most 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from .differences import frobenius, left, too_large

if TYPE_CHECKING:
    import numpy as np

    from ..io.computed import Array

    Decomposition = tuple[Array, Array, Array]


SMALL = 384
"""Matrices whose smaller side is at most this number are decomposed exactly."""

GUESS = 32
"""The first rank to try if the criterion does not set `rank`."""

EXCESS = 0.02
"""A sketch is accepted if its error is at most (1 + EXCESS) times the smallest possible error for the same rank."""

EXACT = 1e-6
"""An error of at most EXACT times the matrix's norm counts as zero: rounding noise alone can cause such an error."""

DEPENDENT = 1e-9
"""`_basis` uses QR if the smallest eigenvalue of the Gram matrix is at most DEPENDENT times the largest eigenvalue.
Such a small eigenvalue may be only rounding noise."""

TESTS = 8
POWERS = 24
"""To bound the largest singular value of R = D - Q Q^T D, `_largest_squares` multiplies TESTS random vectors by R^T R,
at most POWERS times."""


def dominant(D: Array, criterion: Criterion, seed: int) -> Decomposition:
    """Return the SVD of a matrix, truncated according to a criterion: U `[m, k]`, S `[k]`, Vh `[k, n]`.

    Args:
        D: `[m, n]`, float32 or float64.
        criterion: decides how many singular values to keep. It is applied to this matrix alone.
        seed: the seed of the random vectors.

    Returns:
        the decomposition. With a probability of at least 1 - 1e-8, its Frobenius error is at most (1 + EXCESS) times
        the error of the best approximation of the same rank, or at most EXACT times the norm of the matrix.

    Raises:
        Malformed: the square of the matrix's norm is too large for float64.
    """
    import numpy as np

    small, norm = min(D.shape), frobenius(D)
    if not math.isfinite(norm):
        raise too_large()
    rank = min(criterion.rank or GUESS, small)
    random = np.random.default_rng(seed)
    # Try a cheap sketch, then a better sketch. If both are too inexact and the criterion sets a rank, decompose D
    # exactly. If the criterion does not set a rank, the guessed rank may also be too small: double it and try again, as
    # long as a sketch is cheaper than the exact decomposition.
    while small > SMALL and 3 * rank <= small and norm > 0:
        for width, rounds in ((2 * rank + 16, 2), (3 * rank + 32, 4)):
            Q, rows, decomposition = _sketch(D, min(width, small), rounds, random)
            kept = decomposition[1][:rank]
            if not criterion.reached(kept, norm):
                break
            count = criterion.counts([kept], [norm])[0]
            if _good(D, Q, rows, decomposition, count, norm, random):
                return first(decomposition, count)
        rank = small if criterion.rank is not None else 2 * rank
    decomposition = exact(D)
    return first(decomposition, criterion.counts([decomposition[1]], [norm])[0])


def approximated(D: Array, rank: int, seed: int) -> tuple[Decomposition, float, float]:
    """Return a truncated SVD of a matrix, computed from one sketch.

    If the matrix is small, or if `rank` is more than a third of its smaller side, the SVD is computed exactly instead.

    Args:
        D: `[m, n]`, float32 or float64.
        rank: the number of singular values to keep.
        seed: the seed of the random vectors.

    Returns:
        the truncated SVD, the Frobenius norm of the matrix, and the Frobenius norm of the error.

    Raises:
        Malformed: the square of the matrix's norm is too large for float64.
    """
    import numpy as np

    norm, small = frobenius(D), min(D.shape)
    if not math.isfinite(norm):
        raise too_large()
    if small <= SMALL or 3 * rank > small or norm == 0:
        decomposition = first(exact(D), rank)
    else:
        random = np.random.default_rng(seed)
        decomposition = first(_sketch(D, min(2 * rank + 16, small), 2, random)[2], rank)
    U, S, Vh = decomposition
    return decomposition, norm, _lost(norm, S, lambda: left(D, U * S, Vh))


def streamed(
    rows: Callable[[], Iterable[tuple[slice, Array]]], shape: tuple[int, int], rank: int, seed: int
) -> tuple[Decomposition, float, float]:
    """Like `approximated`, but for a matrix that is too large for memory. The SVD always comes from a sketch.

    `rows` is called six times. Each call must yield all blocks of the matrix. A block is a pair: the slice of its row
    indices, and the array of these rows.
    """
    import numpy as np

    m, n = shape
    width = min(2 * rank + 16, m, n)

    def times(X: Array) -> Array:
        """Return D @ X."""
        result = np.empty((m, X.shape[1]))
        for span, part in rows():
            result[span] = part @ X
        return result

    def under(Q: Array) -> tuple[Array, float]:
        """Return Q^T @ D and the squared norm of D."""
        result, square = np.zeros((Q.shape[1], n)), 0.0
        for span, part in rows():
            result += Q[span].T @ part
            square += frobenius(part) ** 2
        return result, square

    Q = _basis(times(np.random.default_rng(seed).standard_normal((n, width))))
    for _ in range(2):
        Q = _basis(times(_basis(under(Q)[0].T)))
    part, square = under(Q)
    if not math.isfinite(square):
        raise too_large()
    U, S, Vh = first(_by_gram(part), rank)
    norm = math.sqrt(square)
    return (Q @ U, S, Vh), norm, _lost(norm, S, None)


def _lost(norm: float, S: Array, measure: Callable[[], float] | None) -> float:
    """Return the Frobenius norm of the error of a truncated SVD: the square root of norm^2 - sum(S^2).

    If the error is so small that this difference is inexact, call `measure`, which computes the error from the matrix.
    """
    square = norm**2 - float((S.astype("<f8") ** 2).sum())
    if square < 1e-6 * norm**2 and measure is not None:
        return measure()
    return math.sqrt(max(square, 0.0))


def exact(D: Array) -> Decomposition:
    """Return the thin SVD in float64. If D is large, compute it from the eigenvectors of the smaller Gram matrix."""
    import numpy as np

    D = D.astype(np.float64, copy=False)
    if D.size > SMALL * SMALL:
        return _by_gram(D)
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    return U, S, Vh


def _by_gram(D: Array) -> Decomposition:
    import numpy as np

    if D.shape[0] > D.shape[1]:
        U, S, Vh = _by_gram(D.T)
        return Vh.T, S, U.T
    U = np.linalg.eigh(D @ D.T)[1][:, ::-1]
    # Compute each singular value as the norm of a row of U^T D, not as the root of an eigenvalue, because small
    # eigenvalues are only rounding noise. With these norms, the product U S Vh equals D up to rounding.
    rows = U.T @ D
    S = np.sqrt((rows * rows).sum(1))
    order = np.argsort(-S, kind="stable")
    return U[:, order], S[order], rows[order] / np.maximum(S[order], np.finfo(float).tiny)[:, None]


def _sketch(D: Array, width: int, rounds: int, random: np.random.Generator) -> tuple[Array, Array, Decomposition]:
    """Return an orthonormal basis Q `[m, width]` of D's main directions, the matrix Q^T D, and the SVD of Q Q^T D."""
    import numpy as np

    Q = _basis(D @ random.standard_normal((D.shape[1], width), dtype=np.float32).astype(D.dtype))
    for _ in range(rounds):
        Q = _basis(D @ _basis(D.T @ Q))
    rows = Q.T @ D
    U, S, Vh = _by_gram(rows.astype(np.float64))
    return Q, rows, (Q @ U, S, Vh)


def _basis(block: Array) -> Array:
    """Return an orthonormal basis of the columns of `block`, from a Gram matrix (Stathopoulos and Wu 2002) or QR."""
    import numpy as np

    # The Gram matrix is much faster than QR, but inexact if the columns are nearly dependent. In that case,
    # its smallest eigenvalue is close to 0.
    wide = block.astype(np.float64, copy=False)
    squares, vectors = np.linalg.eigh(wide.T @ wide)
    if squares[0] <= DEPENDENT * squares[-1]:
        return np.linalg.qr(block)[0]
    basis: Array = (wide @ (vectors / np.sqrt(squares))).astype(block.dtype)
    return basis


def _good(
    D: Array, Q: Array, rows: Array, decomposition: Decomposition, count: int, norm: float, random: np.random.Generator
) -> bool:  # fmt: skip
    """Whether the decomposition, truncated to `count` singular values, is accurate enough.

    The error must be negligible, or provably at most (1 + EXCESS) times the smallest possible error.
    """
    U, S, Vh = first(decomposition, count)
    square = max(norm**2 - float((S * S).sum()), 0.0)
    if square < 1e-4 * norm**2:
        square = frobenius(D - (U * S).astype(D.dtype) @ Vh.astype(D.dtype)) ** 2
    if square <= (EXACT * norm) ** 2:
        return True
    mixed = _mixed(D, Q, rows, count)
    return any(
        square <= (1 + EXCESS) ** 2 * (square - min(count * rest, mixed + float((rest - S * S).clip(0).sum())))
        for rest in _largest_squares(D, Q, random)
    )


def _mixed(D: Array, Q: Array, rows: Array, count: int) -> float:
    """Return the sum of the `count` largest singular values of R D^T Q, where R = D - Q Q^T D."""
    import numpy as np

    block = D @ rows.T
    block = (block - Q @ (Q.T @ block)).astype(np.float64, copy=False)
    return float(np.sqrt(np.linalg.eigvalsh(block.T @ block)[-count:].clip(0)).sum())


def _largest_squares(D: Array, Q: Array, random: np.random.Generator) -> Iterator[float]:
    """Yield upper bounds of the largest squared singular value of R = D - Q Q^T D, each tighter than the one before."""
    import numpy as np

    x = random.standard_normal((D.shape[1], TESTS), dtype=np.float32).astype(D.dtype)
    x /= np.sqrt((x * x).sum(0))
    log = 0.0
    for power in range(1, POWERS + 1):
        y = D @ x
        y -= Q @ (Q.T @ y)
        x = D.T @ y
        size = float(np.sqrt((x.astype(np.float64) ** 2).sum(0)).max())
        if size == 0:
            yield 0.0
            return
        # To avoid overflow, divide all vectors by the largest norm after each step, and add its logarithm to `log`.
        log += math.log(size)
        x /= size
        yield math.exp((log + math.log(8 * math.sqrt(D.shape[1]))) / power)


def first(decomposition: Decomposition, count: int) -> Decomposition:
    """Return the first `count` singular values and vectors."""
    U, S, Vh = decomposition
    return U[:, :count], S[:count], Vh[:count]


# Choose how many singular values to keep: by a rank, a share of energy, an error, or one of kohya's rules.


SCOPES = ("target", "all")
_ONE = "Pass exactly one criterion, such as --rank N (rank=) or --energy SHARE (energy=)"
_RANK = "Pass --rank N (rank=) of at least 1"

NAMES = "rank, energy, error, frobenius, sv_ratio, sv_cumulative and sv_fro"


@dataclass(frozen=True, slots=True)
class Criterion:
    """A criterion for how many singular values to keep. If only `scope` is set, all singular values are kept.

    Only one field besides `scope` may be set. The exception is kohya's rules (`sv_*`): each of them may be combined
    with `rank`, which is then an upper limit.

    Attributes:
        rank: the number of singular values to keep.
        energy: the share of the squared Frobenius norm to keep, up to 1.
        error: the largest allowed Frobenius norm of the truncation error, divided by the norm of the weight's change.
        frobenius: the largest allowed Frobenius norm of the truncation error.
        sv_ratio: kohya's rule: keep each singular value S[i] with S[i] > S[0] / sv_ratio.
        sv_cumulative: kohya's rule: keep at least this share of the sum of the singular values.
        sv_fro: kohya's rule: keep at least this share of the Frobenius norm. The corresponding share of the energy is
            the square of `sv_fro`.
        scope: `target`: apply the criterion to each weight separately. `all`: compare the singular values of all
            weights, and keep the largest. In this case, `rank` is the mean rank, and energy, error and frobenius apply
            to the whole adapter.
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
        """Check that exactly one criterion is set, and that its value is in range.

        Args:
            needed: if True, a missing criterion is an error. If False, it is allowed.

        Raises:
            UsageError: no criterion or too many criteria are given, or a value is out of range.
        """
        given = self.record()
        chosen = [name for name in given if name != "rank" or not self._by_values]
        if len(chosen) > 1 or (needed and not given):
            given_text = " and ".join(chosen) or "none"
            raise UsageError(f"exactly one of {NAMES} is needed, got {given_text}", cure=_ONE)
        if self._by_values and self.scope != "target":
            why = f"{chosen[0]} applies to each target separately, so the scope must be target"
            raise UsageError(why, where="scope", cure="Omit --scope (scope=)")
        if self.sv_ratio is not None and not 1 <= self.sv_ratio < math.inf:
            why = f"sv_ratio is {self.sv_ratio}, but must be a finite number of at least 1"
            raise UsageError(why, where="sv_ratio", cure="Choose another value")
        for name in ("sv_cumulative", "sv_fro"):
            if name in given and not 0 < given[name] <= 1:
                raise UsageError(
                    f"{name} is {given[name]}, but must be above 0 and at most 1",
                    where=name,
                    cure="Choose another value",
                )
        if self.scope not in SCOPES:
            raise UsageError(f"unknown scope {self.scope!r}", cure=f"Known: {', '.join(SCOPES)}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(f"rank is {self.rank}, but must be a whole number of at least 1", where="rank", cure=_RANK)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(
                f"energy is {self.energy}, but must be above 0 and at most 1",
                where="energy",
                cure="Choose another value",
            )
        for name in ("error", "frobenius"):
            value = given.get(name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(
                    f"{name} is {value}, but must be a finite number of at least 0",
                    where=name,
                    cure="Choose another value",
                )

    def record(self) -> dict[str, float]:
        """Return the fields that are set, except `scope`, as a map from name to value.

        The lineage of an adapter contains this map.
        """
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

        Scope `target` keeps at least one singular value of each weight; scope `all` keeps at least one in total.

        Args:
            spectra: the singular values of each weight, largest first. The smallest singular values may be missing.
            norms: the Frobenius norm of each weight's change.
        """
        if self.scope == "target":
            return [self._count(S, norm, 1) for S, norm in zip(spectra, norms, strict=True)]
        import numpy as np

        pooled = np.concatenate(list(spectra))
        owner = np.repeat(np.arange(len(spectra)), [len(S) for S in spectra])
        # Use a stable sort, so that every platform keeps the same singular values if some are equal.
        order = np.argsort(-pooled, kind="stable")
        kept = owner[order[: self._count(pooled[order], math.hypot(*norms), len(spectra))]]
        return [int(count) for count in np.bincount(kept, minlength=len(spectra))]

    def reached(self, S: Array, norm: float) -> bool:
        """Whether S, which may lack the smallest singular values, is long enough to apply the criterion."""
        return len(S) >= self._count(S, norm, 1, beyond=1)

    def _count(self, S: Array, norm: float, weights: int, beyond: int = 0) -> int:
        """Return the smallest number of singular values that meets the criterion.

        If S has too few singular values to meet the criterion, return len(S) + `beyond`.
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
        """Return how many singular values kohya's rule keeps, at least 1.

        If this number depends on singular values that are missing from S, return len(S) + `beyond`.

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
        """Return the largest allowed Frobenius norm of the truncation error; None if there is no limit."""
        if self.energy is not None:
            return math.sqrt(1 - self.energy) * norm
        return self.frobenius if self.error is None else self.error * norm


def _left_out(S: Array, norm: float) -> list[float]:
    """Return a list whose item i is the Frobenius norm of the error if only the i largest singular values are kept."""
    import numpy as np

    squares = np.concatenate([S, [0.0]]) ** 2
    tails = np.cumsum(squares[::-1])[::-1]
    unseen = max(norm**2 - float(tails[0]), 0.0)
    # If `unseen` is only rounding noise, S contains all singular values. Set `unseen` to zero, because its square root
    # would be much larger than the noise.
    unseen = 0.0 if unseen <= 1e-14 * norm**2 else unseen
    return [math.sqrt(float(tail) + unseen) for tail in tails]
