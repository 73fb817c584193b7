"""Compare two adapters: whether both make the same change, and how similar their changes are.

If both changes have low-rank factors, norms, angles and subspaces are computed from small matrices (see `lowrank`).
Only the comparison of single elements multiplies the factors, a few rows per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..core.arguments import checks_types
from ..core.tables import html_table
from ..core.updates import Additive, Update
from ..errors import AdapterkitError, UsageError
from ..io.computed import wide
from ..io.lazy import as_lazy, files_kept_open
from ..io.stages import stage
from .alignment import AlignedPlace, places, side_by_side
from .differences import errors_at
from .lowering import Delta, additive, loaded
from .lowrank import cores
from .prefetch import one_blas_thread

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..io.computed import Array
    from ..io.lazy import Lazy
    from ..io.strict_json import JsonValue
    from .alignment import Source
    from .lowering import Base

PIECE = 1 << 15
"""The number of elements that are compared in one step. Arrays of this size fit in a processor core's cache."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """The comparison of two adapters at one target. Figures that could not be computed are None.

    Attributes:
        target: the target.
        bits: whether both adapters have the same methods and settings at the target, and tensors with the same bytes.
        equal: whether both adapters make the same change within the tolerance. The changes cannot be computed if a
            method needs a missing base or does not change weights. In this case, `equal` is False if one adapter lacks
            the target, True if both adapters have the same methods, settings and tensor values, and otherwise None.
        relative_error: Frobenius norm of the difference between the two changes, divided by the norm of the larger
            change.
        norm_a: Frobenius norm of the first adapter's change of weight and bias together.
        norm_b: the same norm for the second adapter.
        effective_rank_a: exponential of the entropy of the singular values of the first adapter's weight change (Roy
            and Vetterli 2007). For stacked experts, the effective rank is the mean over the experts.
        effective_rank_b: effective rank of the second adapter's weight change, computed like `effective_rank_a`.
        cosine: cosine of the angle between the two changes. Each change is one vector of all elements of weight and
            bias.
        overlap_out: overlap of the column spaces of the two weight changes, from 0 (orthogonal) to 1 (the smaller space
            lies in the larger one). The overlap is the mean squared cosine of the principal angles. For stacked
            experts, it is the mean over the experts.
        overlap_in: overlap of the row spaces of the two weight changes, computed like `overlap_out`.
        sign_conflict: share of elements that the two adapters change with opposite signs, among the weight's elements
            that both adapters change.
        interference: share of the changes that cancels when both changes are added:
            `1 - sum|a + b| / (sum|a| + sum|b|)`.
    """

    target: str
    bits: bool
    equal: bool | None = None
    relative_error: float | None = None
    norm_a: float | None = None
    norm_b: float | None = None
    effective_rank_a: float | None = None
    effective_rank_b: float | None = None
    cosine: float | None = None
    overlap_out: float | None = None
    overlap_in: float | None = None
    sign_conflict: float | None = None
    interference: float | None = None

    def record(self) -> dict[str, JsonValue]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two adapters.

    Attributes:
        targets: one `Likeness` for each target that at least one of the adapters has.
        relative_error: the Frobenius norm of the difference between the two adapters' changes of all targets, divided
            by the norm of the larger change; None if the changes could not be computed at some target.
        cosine: the cosine of the angle between the two adapters' changes. Each change is one vector of the elements of
            all targets. None if a change is zero, or could not be computed at some target.
        tolerance: the largest relative error at which two changes count as equal.
    """

    targets: tuple[Likeness, ...]
    relative_error: float | None
    cosine: float | None
    tolerance: float

    def __repr__(self) -> str:
        equal = sum(each.equal is True for each in self.targets)
        error = "unknown" if self.relative_error is None else f"{self.relative_error:.3g}"
        return f"Comparison(equal={self.equal}: {equal:,} of {len(self.targets):,} targets, relative error {error})"

    def _repr_html_(self) -> str:
        columns = [field.name for field in fields(Likeness)]
        return html_table(repr(self), columns, [[getattr(each, name) for name in columns] for each in self.targets])

    @property
    def equal(self) -> bool | None:
        """Whether both adapters make the same change at every target.

        False if `Likeness.equal` is False at some target; otherwise None if `Likeness.equal` is None at some target.
        """
        verdicts = [each.equal for each in self.targets]
        return False if False in verdicts else None if None in verdicts else True

    def record(self) -> dict[str, JsonValue]:
        return {
            "equal": self.equal, "relative_error": self.relative_error, "cosine": self.cosine,
            "tolerance": self.tolerance, "targets": [each.record() for each in self.targets],
        }  # fmt: skip


@checks_types
def compare(
    one: Source, other: Source, *, base: Base | None = None, tolerance: float = 1e-6, signs: bool = True,
    rename: str | Sequence[str] = (), strict_base: bool = False,
) -> Comparison:  # fmt: skip
    """Compare two adapters of any formats and methods, target by target.

    Args:
        one: an adapter or its path.
        other: the other adapter or its path.
        base: the base. Names and layouts are resolved against the base, and some methods need its weights.
        tolerance: the largest relative error at which two changes count as equal.
        signs: whether to also compare single elements, for `sign_conflict` and `interference`. This takes longer,
            because every element of both changes is computed.
        rename: rules for the names in both adapters, each `FROM=TO` or `@FILE`; the first rule that matches a target's
            name is used.
        strict_base: whether to refuse a base that differs from the base that an adapter records.

    Raises:
        CheckFailed: the base differs from the base that an adapter records, and `strict_base` is set.
        UsageError: the adapters have no target in common; the shape of a weight is needed, but unknown without a base;
            or the tolerance is out of range.
        ShapeMismatch: the adapters were made for different weights.
        Malformed: a tensor contains a NaN or an infinity.
    """
    stage("comparing the updates")
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"tolerance {tolerance} is out of range", cure="Choose a finite number of at least 0")
    _, aligned = places([one, other], base=base, rename=rename, strict_base=strict_base)
    sums = [0.0] * 4
    with files_kept_open(), one_blas_thread():
        likenesses = tuple(_likeness(place, tolerance, signs, sums) for place in aligned)
    known = all(each.relative_error is not None for each in likenesses)
    a, b, product, difference = sums
    larger = math.sqrt(max(a, b))
    return Comparison(
        likenesses,
        (math.sqrt(difference) / larger if larger else 0.0) if known else None,
        _clipped(product / math.sqrt(a * b)) if known and a * b > 0 else None,
        tolerance,
    )


def same_bits(one: Sequence[Update], other: Sequence[Update]) -> bool:
    """Whether two adapters' updates of a target have the same methods and settings, and tensors with the same bytes."""
    if _outline(one) != _outline(other):
        return False
    pairs = [(u.tensors[name], v.tensors[name]) for u, v in zip(one, other, strict=True) for name in u.tensors]
    return all(_same_leaf(as_lazy(left), as_lazy(right)) for left, right in pairs)


def _outline(updates: Sequence[Update]) -> list[object]:
    return [(type(update), update.attributes, [*update.tensors]) for update in updates]


def _same_leaf(one: Lazy, other: Lazy) -> bool:
    if one is other or (one.span is not None and one.span == other.span):
        return True
    return (one.shape, one.dtype) == (other.shape, other.dtype) and bytes(one.fetch()) == bytes(other.fetch())


def _likeness(place: AlignedPlace, tolerance: float, signs: bool, sums: list[float]) -> Likeness:
    bits = same_bits(*place.updates)
    try:
        additive_place = lowered(place)
    except AdapterkitError as error:
        # The changes cannot be computed, because an update needs a base or does not change weights. The adapters still
        # count as equal if their updates have the same methods, settings and tensor values.
        additive_place = None
        if place.base is not None and all(update.kind in ("additive", "weight") for update in place.all_updates):
            raise error.at(where=str(place.target)) from None
    if additive_place is None:
        alone = not all(place.updates)
        return Likeness(str(place.target), bits, False if alone else bits or _same_numbers(place) or None)
    with errors_at(place.target):
        return _measured(additive_place, bits, tolerance, signs, sums)


def lowered(place: AlignedPlace) -> AlignedPlace:
    """Return `place` with additive updates only: replace all other updates by differences from the base's weights.

    Raises:
        AdapterkitError: see `lowering.additive`.
    """
    if all(isinstance(update, Additive) for update in place.all_updates):
        return place
    from ..core.adapter import Adapter

    both = [Adapter({place.target: group}) if group else None for group in place.updates]
    additives = [None if a is None else additive(a, place.base, "compared") for a in both]
    return AlignedPlace(place.target, tuple(() if a is None else _only(a) for a in additives), place.base)


def _only(adapter: Adapter) -> tuple[Update, ...]:
    (updates,) = adapter.updates.values()
    return updates


def _same_numbers(place: AlignedPlace) -> bool:
    """Whether both adapters' updates have the same methods and settings, and tensors with equal values.

    The dtypes may differ.
    """
    one, other = place.updates
    if _outline(one) != _outline(other):
        return False
    ready = [[loaded(update, place.target).tensors for update in group] for group in (one, other)]
    pairs = [(u[name], v[name]) for u, v in zip(*ready, strict=True) for name in u]
    return all(left.shape == right.shape and bool((left == right).all()) for left, right in pairs)


def _measured(place: AlignedPlace, bits: bool, tolerance: float, signs: bool, sums: list[float]) -> Likeness:
    changes = place.changes()
    biases = [None if change is None else change.bias() for change in changes]
    narrow = wide([leaf for update in place.all_updates for leaf in update.tensors.values()]).name == "F32"
    weights = [_weight(pair, signs, narrow) for pair in side_by_side(changes)]
    totals = [math.fsum(each[i] for each in weights) + extra for i, extra in enumerate(_of_biases(biases))]
    # If all bytes are equal, set the squared distance to zero, because the computed distance may be rounding noise.
    if bits:
        totals[3] = 0.0
    for i, value in enumerate(totals):
        sums[i] += value
    a, b, product, difference = totals
    larger = math.sqrt(max(a, b))
    error = math.sqrt(difference) / larger if larger else 0.0
    more = [_mean(column) for column in zip(*(each[4:8] for each in weights), strict=True)] or [None] * 4
    both, against, moved, left = (sum(each[8 + i] for each in weights) for i in range(4))
    return Likeness(
        str(place.target), bits, bits or error <= tolerance, error, math.sqrt(a), math.sqrt(b), more[0], more[1],
        _clipped(product / math.sqrt(a * b)) if a * b > 0 else None, more[2], more[3],
        against / both if both else None, 1 - left / moved if moved else None,
    )  # fmt: skip


def _weight(pair: Sequence[Delta | None], signs: bool, narrow: bool) -> list[Any]:
    """Compare the two changes of one weight, and return twelve figures.

    The figures are, in this order: both squared norms, the inner product, the squared distance, both effective ranks,
    both overlaps, and the four results of `_elements`.
    """
    import numpy as np

    one, other = pair
    if one is None or other is None:
        alone = one or other
        assert alone is not None
        S = np.linalg.svd(cores([alone])[0], compute_uv=False)
        square, rank = float((S * S).sum()), effective_rank(S)
        first = one is not None
        return [
            square if first else 0.0, 0.0 if first else square, 0.0, square,
            rank if first else None, None if first else rank, None, None, 0, 0, 0.0, 0.0,
        ]  # fmt: skip
    M, N = cores([one, other])
    parts = [_directions(M), _directions(N)]
    products = [float((M * M).sum()), float((N * N).sum()), float((M * N).sum()), float(((M - N) ** 2).sum())]
    ranks = [effective_rank(S) for _, S, _ in parts]
    overlaps = [_overlap(parts[0][side], parts[1][side]) for side in (0, 2)]
    return [*products, *ranks, *overlaps, *(_elements(one, other, narrow) if signs else (0, 0, 0.0, 0.0))]


def _of_biases(biases: Sequence[Array | None]) -> list[float]:
    import numpy as np

    a, b = (np.zeros(1) if each is None else each for each in biases)
    return [float((x * y).sum()) for x, y in ((a, a), (b, b), (a, b), (a - b, a - b))]


def _elements(one: Delta, other: Delta, narrow: bool) -> tuple[int, int, float, float]:
    """Compare two changes element by element.

    Return (number of elements with a and b nonzero, number of elements with a * b < 0, sum|a| + sum|b|, sum|a + b|).
    Here, a is an element of the first change, and b is the element of the second change at the same position.

    Args:
        one: the first change.
        other: the second change.
        narrow: whether no stored tensor is float64. If so, the elements are computed in float32, which takes half the
            time, unless `_narrowed` returns None. In float32, only elements that are pure rounding noise can get a
            wrong sign, and `sign_conflict` and `interference` differ from their float64 values by at most 1e-6.
    """
    import numpy as np

    both, against, moved, left = 0, 0, 0.0, 0.0
    pair = _narrowed(one, other) if narrow else None
    first, second = pair or (one, other)
    for a, b in zip(_rows(first), _rows(second), strict=True):
        product = a * b
        both += int(np.count_nonzero(product))
        against += int(np.count_nonzero(product < 0))
        left += float(np.abs(np.add(a, b, out=product), out=product).sum())
        moved += float(np.abs(a, out=a).sum()) + float(np.abs(b, out=b).sum())
    return both, against, moved, left


def _narrowed(one: Delta, other: Delta) -> tuple[Delta, Delta] | None:
    """Return both changes in float32, both multiplied by the same power of two, so that no element exceeds 1.

    Return None if a change is zero or infinite, or if one change is more than 1e12 times smaller than the other.
    """
    import numpy as np

    sizes = [_largest(delta) for delta in (one, other)]
    if not 0 < min(sizes) <= max(sizes) < math.inf or min(sizes) < 1e-12 * max(sizes):
        return None
    shift = -math.frexp(max(sizes))[1]
    deltas = []
    for delta in (one, other):
        # Divide A by a power of two near A's largest magnitude, and multiply B by the same power, so that neither
        # factor underflows in float32.
        sides = math.frexp(float(np.abs(delta.A).max(initial=0.0)) or 1.0)[1]
        B, A = (np.ldexp(X, k).astype("<f4") for X, k in ((delta.B, shift + sides), (delta.A, -sides)))
        deltas.append(Delta(B, A, None if delta.rest is None else np.ldexp(delta.rest, shift).astype("<f4")))
    return deltas[0], deltas[1]


def _largest(delta: Delta) -> float:
    """Return an upper bound for the magnitudes of a change's elements."""
    import numpy as np

    def largest(array: Array) -> float:
        # Without `initial`, `max` fails for a tensor without elements, which a damaged file may contain.
        return float(np.abs(array).max(initial=0.0))

    product = largest(delta.B) * largest(delta.A) * delta.rank
    return product + (0.0 if delta.rest is None else largest(delta.rest))


def _rows(delta: Delta) -> Iterator[Array]:
    """Yield the change as dense blocks of a few rows; callers may overwrite the blocks."""
    step = max(1, PIECE // max(delta.shape[1], 1))
    for start in range(0, delta.shape[0], step):
        rows = slice(start, start + step)
        yield Delta(delta.B[rows], delta.A, None if delta.rest is None else delta.rest[rows]).dense()


def _directions(core: Array) -> tuple[Array, Array, Array]:
    """Return a core's left singular vectors, singular values and right singular vectors.

    Singular values that are only rounding noise are dropped, together with their vectors.
    """
    import numpy as np

    U, S, Vh = np.linalg.svd(core, full_matrices=False)
    count = int((S[:1] * 1e-12 < S).sum())
    return U[:, :count], S[:count], Vh[:count].T


def effective_rank(S: Array) -> float:
    """Return the exponential of the entropy of singular values `[r]` (Roy and Vetterli 2007); 0 if all are 0."""
    import numpy as np

    shares = S[S > 0] / max(float(S.sum()), 5e-324)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _overlap(one: Array, other: Array) -> float | None:
    """Return the mean squared cosine of the principal angles between two column spaces.

    `one` and `other` are matrices with orthonormal columns. Return None if one of them has no columns.
    """
    smaller = min(one.shape[1], other.shape[1])
    return float(((one.T @ other) ** 2).sum()) / smaller if smaller else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _clipped(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))
