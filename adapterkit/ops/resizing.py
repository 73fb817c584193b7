"""Other ranks: the best factors of a smaller rank, by QR of the factors and the SVD of a small core.

No product of factors has a smaller error in the Frobenius norm than the first singular values' (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.updates import Additive, Update
from ..errors import UsageError
from ..io.stages import stage
from ..methods.lora import LoRA
from .alignment import Place, places
from .building import balanced, low_rank, result_type
from .criteria import Criterion
from .lowering import Change, Delta
from .lowrank import distance, svd
from .sketching import dominant, first

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..io.computed import Array
    from ..io.lazy import DType
    from .alignment import Source
    from .lowering import Base
    from .sketching import Decomposition

    Report = Callable[["Cut"], Any]


@dataclass(frozen=True, slots=True)
class Cut:
    """What became of the change of one target.

    Attributes:
        target: where.
        method: what it is now; empty where nothing is left.
        before: rank of the factors that were there, or the smaller side of the weight: the rank that it can have.
        rank: of the factors that are there now; None where the change is kept whole.
        norm: Frobenius norm of the change as it was.
        error: Frobenius norm of what was lost, rounding of the new factors included.
    """

    target: str
    method: str
    before: int | None
    rank: int | None
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """The error as a part of the norm."""
        return self.error / self.norm if self.norm else 0.0

    def record(self) -> dict[str, Any]:
        return {
            "target": self.target, "method": self.method, "before": self.before, "rank": self.rank, "norm": self.norm,
            "error": self.error, "relative_error": self.relative,
        }  # fmt: skip


def resize(
    adapter: Source,
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    frobenius: float | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    scope: str = "target",
    base: Base | None = None,
    dtype: str | None = None,
    report: Report | None = None,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
) -> Adapter:
    """The adapter with each change of thin factors as a LoRA of a smaller rank; everything else is kept as it is.

    Args:
        adapter: an adapter or its path; several low-rank updates of one target become one.
        rank: the rank to keep; targets of a smaller one keep theirs.
        energy: the share of each change's squared Frobenius norm to keep at least.
        error: the relative Frobenius error to allow at most.
        frobenius: the Frobenius error to allow at most.
        sv_ratio: kohya's: keep singular values above the largest over this number. With each of kohya's three, `rank`
            is the most that is kept.
        sv_cumulative: kohya's: the share of the sum of singular values to keep at least.
        sv_fro: kohya's: the share of the Frobenius norm to keep at least.
        scope: `target`: each target for itself. `all`: the largest singular values of the adapter, wherever they are;
            `rank` is then the mean rank, and a target that gets none is left out.
        base: settles names, and shapes that the adapter does not tell.
        dtype: the type of the new factors; float32 where not given, float64 where a factor is of it.
        report: called with a `Cut` for each target that is changed.
        rename: rules for names, each `FROM=TO` or `@FILE`; the first that matches a target's name is used.
        strict_base: refuse a base that is not the one that the adapter names.

    Raises:
        CheckFailed: the base is not the one that the adapter names, and `strict_base`.
        UsageError: not exactly one of them is given, or it is out of range; the rank is above what any weight has.
    """
    stage("decomposing the updates")
    criterion = Criterion(rank, energy, error, frobenius, sv_ratio, sv_cumulative, sv_fro, scope)
    criterion.check()
    return _resized("resize", adapter, criterion, base, dtype, report, rename, strict_base, every=False)


def promote(
    adapter: Source,
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    frobenius: float | None = None,
    scope: str = "target",
    base: Base | None = None,
    dtype: str | None = None,
    report: Report | None = None,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
) -> Adapter:
    """The adapter with every change of a matrix as a LoRA, of whatever method it was.

    Without a rank, energy or error the change stays what it is to rounding: methods of thin factors become a LoRA of
    their rank, others one of the rank that their change has.

    Args:
        adapter: an adapter or its path.
        rank: the rank to keep.
        energy: as in `resize`, and so are the next three.
        error: see there.
        frobenius: see there.
        scope: see there.
        base: what laws that need weights are taken at; without it they are kept as they are.
        dtype: the type of the new factors; float32 where not given, float64 where a factor is of it.
        report: called with a `Cut` for each target that is changed.
        rename: rules for names, each `FROM=TO` or `@FILE`; the first that matches a target's name is used.
        strict_base: refuse a base that is not the one that the adapter names.

    Raises:
        CheckFailed: the base is not the one that the adapter names, and `strict_base`.
        UsageError: more than one of the four is given, or it is out of range.
        NotMergeable: with a base, a law that is not one of weights.
    """
    criterion = Criterion(rank, energy, error, frobenius, scope=scope)
    criterion.check(needed=False)
    return _resized("promote", adapter, criterion, base, dtype, report, rename, strict_base, every=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One target: updates that are kept, and those that become one LoRA, each weight's change decomposed."""

    place: Place
    kept: tuple[Update, ...]
    change: Change
    weights: tuple[_Weight, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """One weight's change: as it is, decomposed as far as it is kept, its norm, and the norm of what is cut off it.

    The latter is None where only the part that is kept was worked out.
    """

    delta: Delta
    found: Decomposition
    norm: float
    cut: float | None = None

    def first(self, count: int) -> _Weight:
        """With the first so many singular values alone."""
        return replace(self, found=first(self.found, count), cut=_size(self.found[1][count:]))

    def lost(self, made: Delta) -> float:
        """The distance to what is stored: what is cut off is at right angles to what is kept, so the squares add up."""
        if self.cut is None:
            return distance(self.delta, made)
        return math.hypot(self.cut, distance(Delta(*balanced(*self.found)), made))


def _resized(
    op: str, source: Source, criterion: Criterion, base: Base | None, dtype: str | None, report: Report | None,
    rename: str | Sequence[str], strict_base: bool, *, every: bool,
) -> Adapter:  # fmt: skip
    lower = "promoted" if every and base is not None else None
    (adapter,), found = places([source], base=base, lower=lower, rename=rename, strict_base=strict_base)
    kind = result_type([adapter], dtype)
    _check_rank(criterion, found, every)
    cuts: list[Cut] = []
    updates: dict[Target, tuple[Update, ...]] = {}
    for place, made in _made(found, criterion, kind, every, cuts):
        if made:
            updates[place.target] = made
    if not cuts and not every:
        raise UsageError("no change here has thin factors", cure="Promote the adapter instead")
    for cut in cuts if report is not None else ():
        report(cut)  # type: ignore[misc]
    args = {**criterion.record(), "scope": criterion.scope, "error_of_all": _relative(cuts)}
    return adapter.replace(updates=updates).step(op, **args)


def _made(
    found: Sequence[Place], criterion: Criterion, kind: DType, every: bool, cuts: list[Cut]
) -> Iterator[tuple[Place, tuple[Update, ...]]]:
    """Each place's new updates; in scope `all` the factors of all of them are held until the ranks are known."""
    parts: Iterator[_Part | None] = (_part(place, criterion, every) for place in found)
    if criterion.scope == "all":
        parts = iter(_rationed(list(parts), criterion))
    for place, part in zip(found, parts, strict=True):
        if part is None:
            yield place, place.updates[0]
        else:
            yield place, _finished(part, kind, cuts)


def _part(place: Place, criterion: Criterion, every: bool) -> _Part | None:
    """A place's decomposed change, cut where it is cut for itself; None where there is nothing to change."""
    updates = place.updates[0]
    own = _own(place, every)
    # Without a criterion, what is a LoRA already is as it should be.
    if not own or (not criterion.record() and len(own) == 1 and isinstance(own[0], LoRA)):
        return None
    change = Change(place.target, place.shape, tuple(own))
    kept = tuple(update for update in updates if not any(update is each for each in own))
    return _Part(place, kept, change, tuple(_decomposed(delta, place, criterion) for delta in change.deltas()))


def _own(place: Place, every: bool) -> list[Additive]:
    """The additive updates of a matrix behind the last that is none: what stands before that may be undone there."""
    updates = place.updates[0]
    last = max((i + 1 for i, update in enumerate(updates) if not isinstance(update, Additive)), default=0)
    own = [update for update in updates[last:] if isinstance(update, Additive) and update.changes_weight]
    own = [update for update in own if every or type(update).pair is not Additive.pair]
    return own if own and len(place.shape) > 1 else []


def _decomposed(delta: Delta, place: Place, criterion: Criterion) -> _Weight:
    if delta.rest is not None and criterion.record() and criterion.scope == "target":
        D = delta.dense()
        return _Weight(delta, dominant(D, criterion, seed_of(str(place.target))), _size(D))
    found = svd(delta)
    S = found[1]
    whole = _Weight(delta, found, _size(S), 0.0)
    if criterion.record():
        return whole if criterion.scope == "all" else whole.first(criterion.counts([S], [whole.norm])[0])
    least = S[:1] * 1e-15 * max(delta.shape)
    return whole if delta.rest is None else whole.first(max(int((least < S).sum()), 1))


def _rationed(parts: list[_Part | None], criterion: Criterion) -> list[_Part | None]:
    """Every part with the singular values that it may keep when all of them compete."""
    every = [weight for part in parts if part is not None for weight in part.weights]
    if not every or not criterion.record():
        return parts
    counts = iter(criterion.counts([weight.found[1] for weight in every], [weight.norm for weight in every]))
    return [part and replace(part, weights=tuple(each.first(next(counts)) for each in part.weights)) for part in parts]


def _finished(part: _Part, kind: DType, cuts: list[Cut]) -> tuple[Update, ...]:
    """The kept updates and the new LoRA; none where it got no rank and changes no bias."""
    place, bias = part.place, part.change.bias()
    rank = max(len(weight.found[1]) for weight in part.weights)
    before = max(w.delta.rank if w.delta.rest is None else min(w.delta.shape) for w in part.weights)
    sizes = math.hypot(*(weight.norm for weight in part.weights))
    if rank == 0 and bias is None:
        cuts.append(Cut(str(place.target), "", before, 0, sizes, sizes))
        return part.kept
    lora = low_rank(place.target, place.shape, [balanced(*weight.found) for weight in part.weights], bias, kind)
    made = Change(place.target, place.shape, (lora,)).deltas()
    lost = math.hypot(*(weight.lost(delta) for weight, delta in zip(part.weights, made, strict=True)))
    cuts.append(Cut(str(place.target), lora.method, before, rank, sizes, lost))
    return (*part.kept, lora)


def _check_rank(criterion: Criterion, found: Sequence[Place], every: bool) -> None:
    if criterion.rank is None:
        return
    sides = [min(place.shape[0], math.prod(place.shape[1:])) for place in found if _own(place, every)]
    criterion.check_possible(max(sides, default=criterion.rank))


def _relative(cuts: Sequence[Cut]) -> float:
    """The error of all targets together, relative to their changes."""
    whole = math.hypot(*(cut.norm for cut in cuts))
    return math.hypot(*(cut.error for cut in cuts)) / whole if whole else 0.0


def _size(S: Array) -> float:
    return math.sqrt(float((S * S).sum()))


def seed_of(name: str) -> int:
    """A seed for the random vectors of one target: the same wherever and in whatever order it is worked on."""
    import zlib

    return zlib.crc32(name.encode())
