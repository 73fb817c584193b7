"""Reduce the ranks of adapters, by QR decompositions of the factors and the SVD of a small core.

The SVD, cut to the r largest singular values, is the matrix of rank r with the smallest Frobenius error (Eckart and
Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.arguments import checks_types
from ..core.updates import Additive, Update
from ..errors import UsageError
from ..io.stages import stage
from ..methods.lora import LoRA
from .alignment import AlignedPlace, places
from .differences import errors_at
from .lowering import Change, Delta, balanced, low_rank, result_type
from .lowrank import distance, length, svd
from .prefetch import one_blas_thread
from .sketching import Criterion, dominant, first

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..io.lazy import DType
    from ..io.strict_json import JsonValue
    from .alignment import Source
    from .lowering import Base
    from .sketching import Decomposition

    Report = Callable[["Cut"], Any]

PROMOTE = (
    "Convert the adapter to LoRA with --promote (ak.ops.promote); if its method needs a base, also pass "
    "--base BASE (base=)"
)


@dataclass(frozen=True, slots=True)
class Cut:
    """The effect of a rank reduction or an extraction on one target.

    Attributes:
        target: the target.
        method: the method of the new update; empty if the new update is omitted, because its rank would be 0.
        before: the old rank; for a change without factors, the smaller side of the weight. None for whole parameters
            and token rows.
        rank: the new rank; None if the new update is neither a LoRA nor a DoRA.
        norm: the Frobenius norm of the old change.
        error: the Frobenius norm of the difference between the old and the new change, including the rounding of the
            new factors.
    """

    target: str
    method: str
    before: int | None
    rank: int | None
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """The error divided by the norm."""
        return self.error / self.norm if self.norm else 0.0

    def record(self) -> dict[str, JsonValue]:
        return {
            "target": self.target, "method": self.method, "before": self.before, "rank": self.rank, "norm": self.norm,
            "error": self.error, "relative_error": self.relative,
        }  # fmt: skip


def relative_error(cuts: Sequence[Cut]) -> float | None:
    """Return the error of all cuts together, relative to the norm of the changes before the cuts.

    Return None if nothing was cut, or if all changes are zero.
    """
    whole = math.hypot(*(cut.norm for cut in cuts))
    return math.hypot(*(cut.error for cut in cuts)) / whole if whole else None


@checks_types
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
    """Cut each change with low-rank factors to a LoRA of a smaller rank; keep all other updates unchanged.

    Args:
        adapter: an adapter or its path. Several low-rank updates of one target are joined into one.
        rank: the new rank; targets with a smaller rank keep their rank.
        energy: keep at least this share of each change's squared Frobenius norm.
        error: the largest allowed Frobenius error of a change, divided by the change's norm.
        frobenius: the largest allowed Frobenius error of a change, not divided by the change's norm.
        sv_ratio: kohya's rule: keep each singular value S[i] with S[i] > S[0] / sv_ratio. With any of kohya's three
            rules, `rank` is an upper limit.
        sv_cumulative: kohya's rule: keep at least this share of the sum of the singular values.
        sv_fro: kohya's rule: keep at least this share of the Frobenius norm.
        scope: `target`: apply the criterion to each target separately. `all`: keep the largest singular values of the
            whole adapter. In this case, `rank` is the mean rank, and targets without any kept singular value are
            dropped.
        base: the base, which is used to resolve names, and to read shapes that the adapter does not contain.
        dtype: the dtype of the new factors; default: float64 if any factor is float64, else float32.
        report: a function that is called with a `Cut` for each changed target.
        rename: rules for names, each `FROM=TO` or `@FILE`; the first rule that matches a target's name is used.
        strict_base: whether to refuse a base that differs from the base that the adapter records.

    Raises:
        CheckFailed: the base differs from the base that the adapter records, and `strict_base` is set.
        UsageError: no criterion or too many criteria are given; a value is out of range; the rank is larger than the
            smaller side of every weight; or no change in the adapter has low-rank factors.
    """
    stage("decomposing the updates")
    criterion = Criterion(rank, energy, error, frobenius, sv_ratio, sv_cumulative, sv_fro, scope)
    criterion.check()
    return _resized("resize", adapter, criterion, base, dtype, report, rename, strict_base, every=False)


@checks_types
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
    """Convert the adapter's changes of weight matrices to LoRAs. The changes may come from any method.

    Without a criterion, each LoRA is exact to rounding. The rank of the LoRA is the rank of the method's low-rank
    factors. If the method has no such factors, the rank of the LoRA is the rank of the change.

    Args:
        adapter: an adapter or its path.
        rank: as for `resize`.
        energy: as for `resize`.
        error: as for `resize`.
        frobenius: as for `resize`.
        scope: as for `resize`.
        base: the base, for methods whose changes depend on the base's weights. Without a base, the updates of these
            methods stay unchanged.
        dtype: the dtype of the new factors; default: float64 if any factor is float64, else float32.
        report: a function that is called with a `Cut` for each changed target.
        rename: rules for names, each `FROM=TO` or `@FILE`; the first rule that matches a target's name is used.
        strict_base: whether to refuse a base that differs from the base that the adapter records.

    Raises:
        CheckFailed: the base differs from the base that the adapter records, and `strict_base` is set.
        UsageError: more than one criterion is given, or the value of a criterion is out of range.
        NotMergeable: a base is given, and a method does not change weights.
    """
    criterion = Criterion(rank, energy, error, frobenius, scope=scope)
    criterion.check(needed=False)
    return _resized("promote", adapter, criterion, base, dtype, report, rename, strict_base, every=True)


@dataclass(frozen=True, slots=True, eq=False)
class _ResizedPart:
    """One target: the updates that stay unchanged, and the decomposed change that becomes a LoRA."""

    place: AlignedPlace
    kept: tuple[Update, ...]
    change: Change
    weights: tuple[_DecomposedWeight, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _DecomposedWeight:
    """The change of one weight, the kept part of its decomposition, and two norms.

    `norm` is the norm of the change. `cut` is the norm of the dropped part, or None if only the kept part was computed.
    """

    delta: Delta
    decomposition: Decomposition
    norm: float
    cut: float | None = None

    def first(self, count: int) -> _DecomposedWeight:
        """Keep the first `count` singular values, and drop the rest."""
        return replace(self, decomposition=first(self.decomposition, count), cut=length(self.decomposition[1][count:]))

    def lost(self, delta: Delta) -> float:
        """Return the Frobenius distance between the change and `delta`, the product of the stored factors.

        The distance has two parts: the dropped part of the decomposition, and the error of the stored factors. These
        parts are orthogonal (except for second-order terms), so the squared distance is the sum of their squared norms.
        """
        if self.cut is None:
            return distance(self.delta, delta)
        return math.hypot(self.cut, distance(Delta(*balanced(*self.decomposition)), delta))


def _resized(
    op: str, source: Source, criterion: Criterion, base: Base | None, dtype: str | None, report: Report | None,
    rename: str | Sequence[str], strict_base: bool, *, every: bool,
) -> Adapter:  # fmt: skip
    lower = "promoted" if every and base is not None else None
    (adapter,), aligned = places([source], base=base, lower=lower, rename=rename, strict_base=strict_base)
    kind = result_type([adapter], dtype)
    _check_rank(criterion, aligned, every)
    cuts: list[Cut] = []
    updates: dict[Target, tuple[Update, ...]] = {}
    thin = all(
        type(update).pair is not Additive.pair for place in aligned for update in _trailing_additives(place, every)
    )
    # If all updates have low-rank factors, use one BLAS thread. More threads are not faster. If another program uses
    # one of the cores, the threads also spin while they wait for each other. With more threads, a FLUX LoRA took 30 s
    # of processor time. If any update has no low-rank factors, use all threads.
    with one_blas_thread() if thin else nullcontext():
        for place, resized in _resized_places(aligned, criterion, kind, every, cuts):
            if resized:
                updates[place.target] = resized
    if not cuts and not every:
        raise UsageError("no change in this adapter has low-rank factors", cure=PROMOTE)
    for cut in cuts if report is not None else ():
        report(cut)  # type: ignore[misc]
    # Divide the Frobenius error of all targets together by the Frobenius norm of all changes together.
    error_of_all = relative_error(cuts) or 0.0
    args: dict[str, JsonValue] = {**criterion.record(), "scope": criterion.scope, "error_of_all": error_of_all}
    return adapter.replace(updates=updates).step(op, **args)


def _resized_places(
    aligned: Sequence[AlignedPlace], criterion: Criterion, kind: DType, every: bool, cuts: list[Cut]
) -> Iterator[tuple[AlignedPlace, tuple[Update, ...]]]:
    """Yield (place, new updates) for each target.

    In scope `all`, keep all factors in memory until the ranks are known.
    """
    parts: Iterator[_ResizedPart | None] = (_part(place, criterion, every) for place in aligned)
    if criterion.scope == "all":
        parts = iter(_rationed(list(parts), criterion))
    for place, part in zip(aligned, parts, strict=True):
        if part is None:
            yield place, place.updates[0]
        else:
            yield place, _finished(part, kind, cuts)


def _part(place: AlignedPlace, criterion: Criterion, every: bool) -> _ResizedPart | None:
    """Decompose the change of one target. In scope `target`, also cut the rank of the change.

    Return None if all updates of the target stay unchanged.
    """
    updates = place.updates[0]
    additives = _trailing_additives(place, every)
    # Without a criterion, a single LoRA stays unchanged.
    if not additives or (not criterion.record() and len(additives) == 1 and isinstance(additives[0], LoRA)):
        return None
    change = Change(place.target, place.shape, tuple(additives))
    kept = tuple(update for update in updates if not any(update is each for each in additives))
    with errors_at(place.target):
        return _ResizedPart(
            place, kept, change, tuple(_decomposed(delta, place, criterion) for delta in change.deltas())
        )


def _trailing_additives(place: AlignedPlace, every: bool) -> list[Additive]:
    """Return the additive updates of the weight that follow the target's last non-additive update.

    Earlier updates stay unchanged, because the non-additive update may depend on them. Unless `every` is set, only
    updates with low-rank factors are returned. If the weight has only one dimension, the list is empty.
    """
    updates = place.updates[0]
    last = max((i + 1 for i, update in enumerate(updates) if not isinstance(update, Additive)), default=0)
    additives = [update for update in updates[last:] if isinstance(update, Additive) and update.changes_weight]
    additives = [update for update in additives if every or type(update).pair is not Additive.pair]
    return additives if additives and len(place.shape) > 1 else []


def _decomposed(delta: Delta, place: AlignedPlace, criterion: Criterion) -> _DecomposedWeight:
    if delta.rest is not None and criterion.record() and criterion.scope == "target":
        D = delta.dense()
        return _DecomposedWeight(delta, dominant(D, criterion, seed_of(str(place.target))), length(D))
    decomposition = svd(delta)
    S = decomposition[1]
    whole = _DecomposedWeight(delta, decomposition, length(S), 0.0)
    if criterion.record():
        return whole if criterion.scope == "all" else whole.first(criterion.counts([S], [whole.norm])[0])
    # A dense change often does not have full rank. Drop the singular values that are only rounding noise.
    least = S[:1] * 1e-15 * max(delta.shape)
    return whole if delta.rest is None else whole.first(max(int((least < S).sum()), 1))


def _rationed(parts: list[_ResizedPart | None], criterion: Criterion) -> list[_ResizedPart | None]:
    """Cut the ranks of all targets together: keep the largest singular values of the whole adapter."""
    every = [weight for part in parts if part is not None for weight in part.weights]
    if not every or not criterion.record():
        return parts
    counts = iter(criterion.counts([weight.decomposition[1] for weight in every], [weight.norm for weight in every]))
    return [part and replace(part, weights=tuple(each.first(next(counts)) for each in part.weights)) for part in parts]


def _finished(part: _ResizedPart, kind: DType, cuts: list[Cut]) -> tuple[Update, ...]:
    """Return the unchanged updates and the new LoRA; omit the LoRA if its rank is 0 and it changes no bias."""
    place, bias = part.place, part.change.bias()
    rank = max(len(weight.decomposition[1]) for weight in part.weights)
    before = max(w.delta.rank if w.delta.rest is None else min(w.delta.shape) for w in part.weights)
    sizes = math.hypot(*(weight.norm for weight in part.weights))
    if rank == 0 and bias is None:
        cuts.append(Cut(str(place.target), "", before, 0, sizes, sizes))
        return part.kept
    lora = low_rank(place.target, place.shape, [balanced(*weight.decomposition) for weight in part.weights], bias, kind)
    deltas = Change(place.target, place.shape, (lora,)).deltas()
    lost = math.hypot(*(weight.lost(delta) for weight, delta in zip(part.weights, deltas, strict=True)))
    cuts.append(Cut(str(place.target), lora.method, before, rank, sizes, lost))
    return (*part.kept, lora)


def _check_rank(criterion: Criterion, aligned: Sequence[AlignedPlace], every: bool) -> None:
    if criterion.rank is None:
        return
    sides = [min(place.shape[0], math.prod(place.shape[1:])) for place in aligned if _trailing_additives(place, every)]
    criterion.check_possible(max(sides, default=criterion.rank))


def seed_of(name: str) -> int:
    """Return a seed for one target's random vectors. The seed does not depend on the order of the targets."""
    import zlib

    return zlib.crc32(name.encode())
