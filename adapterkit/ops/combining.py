"""Combine several adapters into one with a method in `COMBINERS`.

First, the arguments are checked and resolved. Then the combiner's formula is evaluated at all targets. If a combiner's
results are always dense and `rank` is not set, each target's result is computed later, when its tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from ..core.adapter import Adapter
from ..core.arguments import check_count, checks_types
from ..errors import PASS_AN_ADAPTER, PASS_BASE, UsageError
from ..io.checkpoint import opened
from ..io.computed import Spool, rounded_lazy
from ..io.stages import stage
from ..methods.dense import Dense
from ..methods.lora import LoRA
from .algebra import listed, summed_at
from .alignment import places, side_by_side, source_adapter
from .blocks import Blocks
from .combiners import COMBINERS
from .combiners._combiner import combiner_of
from .combiners._entrywise import Entrywise
from .combiners._learned import Learned, WeightTrial
from .context import Census, FormulaContext
from .differences import errors_at
from .lowering import Delta, Weights, balanced, blank, dense, low_rank, of_several, result_type, unknown
from .parameters import CombineParameters, one_of, peft_result, resolved
from .prefetch import MEMORY, ahead, most_workers, one_blas_thread
from .resizing import Cut
from .sketching import SMALL, approximated, streamed

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..core.updates import Update
    from ..io.computed import Array
    from ..io.lazy import DType, Shape
    from ..io.strict_json import JsonValue
    from .alignment import AlignedPlace, Source
    from .combiners._combiner import Combiner, Value
    from .lowering import Base, Change, Hold
    from .parameters import Setting
    from .resizing import Report
    from .sketching import Decomposition

FIT = "fit"
"""The value of `rank` that cuts a result only if the result has no low-rank factors.

The result is then cut to the largest rank that the adapters have at the target. If the adapters have no low-rank
factors at the target, the result is cut to the largest rank that they have at any target.
"""


SAMPLED = 16
"""A threshold is first estimated from about this many targets. A bad estimate costs time, but changes no result."""


class Evaluation:
    """Evaluates a combiner's formula at all targets, several in parallel.

    Attributes:
        cuts: a `Cut` for each target whose result was cut to a rank.
        notes: a warning for each target whose result becomes zero in its dtype, or is zero although the adapters'
            changes are not zero.
    """

    def __init__(
        self, asked: CombineParameters, aligned: Sequence[AlignedPlace], dtype: DType, rank: int | str | None,
        seed: int, data: Callable[..., object] | None, base: Weights | None, factor: float = 1.0,
        fallback: int | None = None, progress: Callable[[int, int], object] | None = None, workers: int | None = None,
    ) -> None:  # fmt: skip
        self.asked, self.aligned, self.dtype, self.rank, self.seed, self.data = asked, aligned, dtype, rank, seed, data
        self.base, self.factor, self.fallback, self.progress = base, factor, fallback, progress
        # The caller's `data` function may not be thread-safe.
        self.workers = 1 if data is not None else workers or most_workers()
        self.census = Census()
        self.census.votes_by(self._pass)
        self.cuts: list[Cut] = []
        self.notes: list[str] = []
        self.learned: Mapping[Target, Array] | None = None
        self.asks: Callable[..., object] | None = None
        self.hold: Hold = rounded_lazy

    def updates(self, read: Sequence[Adapter]) -> dict[Target, tuple[Update, ...]]:
        """Return the combined updates of every target."""
        method = self.asked.method(self.aligned[0].target)
        if isinstance(method, Learned):
            self.learned = method.learn(self._trial(read, method))
        updates: dict[Target, tuple[Update, ...]] = {}
        if not isinstance(method, Learned):
            self.asks = self._statistics(method, read, updates)
        with one_blas_thread():
            if self.asked.counts:
                self._count()
            self._fill(updates)
        return updates

    def outline(self) -> dict[Target, tuple[Update, ...]]:
        """Return updates with the methods, shapes and dtypes of the result, without computing the result.

        The tensors of these updates cannot be read. The ranks of these updates are upper bounds.
        """
        return blank({place.target: self._outline_at(place) for place in self.aligned})

    def _outline_at(self, place: AlignedPlace) -> tuple[Update, ...]:
        method = self.asked.method(place.target)
        if self._summed(place, method) is not None:
            return summed_at(place, [1.0] * len(place.updates), stacking=False)
        changes = [change for change in place.changes() if change is not None]
        lead = (changes[0].experts or 1,) if place.target.stacked else ()
        fields: dict[str, Any] = {}
        weighted = any(change.changes_weight for change in changes)
        bias = unknown((*lead, place.shape[0]), self.dtype) if any(c.changes_bias for c in changes) else None
        # If the result may lack low-rank factors, outline it as dense. A format without dense updates refuses such an
        # outline at once. The user can then set `rank="fit"`, which does not change results that have low-rank factors.
        sure = not method.dense and self._thin(place) and not _wide(sum(self._ranks(place)), place.shape)
        if not weighted or len(place.shape) == 1 or (self.rank is None and not sure):
            fields |= {"D": unknown((*lead, *place.shape), self.dtype)} if weighted else {}
            return (Dense(**fields, **({} if bias is None else {"d": bias})),)  # type: ignore[arg-type]
        rank = self.rank if isinstance(self.rank, int) else sum(self._ranks(place)) or self.fallback or 1
        rank = min(rank, place.shape[0], math.prod(place.shape[1:]))
        fields["A"] = unknown((*lead, rank, *place.shape[1:]), self.dtype)
        fields["B"] = unknown((*lead, place.shape[0], rank), self.dtype)
        return (LoRA(**fields, bias=bias),)  # type: ignore[arg-type]

    def _summed(self, place: AlignedPlace, method: Combiner) -> list[float] | None:
        """Return one multiplier per adapter if the result is a weighted sum of the updates and is not cut.

        Otherwise, return None.
        """
        exact = self.rank is None or (self.rank == FIT and self._thin(place))
        return method.sums(self._weights(place.target)) if exact else None

    def _fill(self, updates: dict[Target, tuple[Update, ...]]) -> None:
        total = sum(map(_bytes, self.aligned))
        # Create the spool only now, so that its temporary file contains nothing but the final result. If the method
        # learns weights, it has already computed hundreds of trial results. They were in memory and are freed by now.
        self.hold = Spool().rounded_lazy
        if self.workers == 1:
            results: Iterator[tuple[tuple[Update, ...], Cut | None]] = map(self._placed, self.aligned)
            self._take(results, updates, total)
            return
        with ahead(self._placed, self.aligned, self.workers, self._cost) as several:
            self._take(several, updates, total)

    def _take(
        self, results: Iterator[tuple[tuple[Update, ...], Cut | None]], updates_made: dict[Target, tuple[Update, ...]],
        total: int,
    ) -> None:  # fmt: skip
        done = 0
        for place, (updates, cut) in zip(self.aligned, results, strict=True):
            updates_made[place.target] = updates
            self.cuts += [] if cut is None else [cut]
            done += _bytes(place)
            if self.progress is not None:
                self.progress(done, total)

    def _cost(self, place: AlignedPlace) -> int:
        """Estimate the memory in bytes that the computation of a target needs."""
        out, columns = place.shape[0], math.prod(place.shape[1:])
        if self.rank is not None and self.asked.method(place.target).dense:
            return out * columns * self.dtype.itemsize + (32 << 20)
        return 24 * (out + columns) * sum(self._ranks(place))

    def _ranks(self, place: AlignedPlace) -> list[int]:
        """Return, for each adapter, the sum of the ranks of its LoRA updates at a target."""
        factors = [[update.A for update in updates if isinstance(update, LoRA)] for updates in place.updates]
        return [sum(int(A.shape[int(place.target.stacked)]) for A in each) for each in factors]

    def _placed(self, place: AlignedPlace) -> tuple[tuple[Update, ...], Cut | None]:
        with errors_at(place.target):
            return self._at(place)

    def _count(self) -> None:
        if self.asked.varies:
            why = "the method uses statistics of the whole adapter, so its parameters cannot differ between targets"
            raise UsageError(why, where="scope", cure="Pass --set scope=tensor (scope=), or one value for all targets")
        stages = self.asked.method(self.aligned[0].target).stages
        # With fewer than 2 * SAMPLED targets, `_pass` samples all targets.
        self.census.partial = len(self.aligned) >= 2 * SAMPLED
        self.census.run(lambda few: self._pass(self.census, few), stages)

    def _pass(self, census: Census, few: bool = False) -> None:
        """Run the formula at all targets, or at a few targets, to collect statistics."""
        # Choose every n-th target instead of the first few, because magnitudes change with the depth in a model.
        chosen = self.aligned[:: max(len(self.aligned) // SAMPLED, 1)] if few else self.aligned

        def once(place: AlignedPlace) -> None:
            with errors_at(place.target):
                changes = place.changes()
                for method, at, deltas in self._standings(place, changes, census):
                    self._matrix(method, place, at, deltas)
                self._bias(place, changes, census)

        with ahead(once, chosen, self.workers, self._cost) as done:
            for _ in done:
                pass

    def _at(self, place: AlignedPlace) -> tuple[tuple[Update, ...], Cut | None]:
        method = self.asked.method(place.target)
        sums = self._summed(place, method)
        if sums is not None:
            return summed_at(place, sums, stacking=False), None
        changes = place.changes()
        has_weight = any(change is not None and change.changes_weight for change in changes)
        if has_weight and method.dense and self.rank is None:
            return (self._lazily(place, changes),), None
        bias = self._bias(place, changes)
        if not has_weight:
            return (dense(place.target, place.shape, None, bias, self.dtype, self.hold),), None
        cuts = [self._cut(method, place, at, deltas) for method, at, deltas in self._standings(place, changes)]
        update = self._stored(place, [delta for delta, _, _ in cuts], bias)
        self._look(place, changes, [delta for delta, _, _ in cuts])
        if not any(lost for _, _, lost in cuts):
            return (update,), None
        norm, error = math.hypot(*(size for _, size, _ in cuts)), math.hypot(*(lost for _, _, lost in cuts))
        rank = max(delta.rank for delta, _, _ in cuts)
        cut = Cut(str(place.target), update.method, min(cuts[0][0].shape), rank, norm, error)
        return (update,), cut

    def _look(self, place: AlignedPlace, changes: Sequence[Change | None], deltas: Sequence[Delta] | None) -> None:
        """Add a note if a result is zero, or becomes zero in its dtype, although the changes are not zero."""
        import numpy as np

        kind = np.finfo(np.float64 if self.dtype.name == "F64" else np.float32)
        bound = 0.0 if deltas is None else max(map(_bound, deltas))
        sizes = [_size(X) for d in deltas or () for X in (d.B, d.A, d.rest) if X is not None]
        small = max(sizes, default=0.0) < kind.smallest_subnormal
        if bound and not small:
            return  # Most results return here, without loading the changes again.
        # Compute only an upper bound for the entries of the changes, because the bound needs no product of factors.
        given = max((_bound(d) for c in changes if c is not None and c.changes_weight for d in c.deltas()), default=0.0)
        if not given:
            return
        if deltas is None:
            bound = given * max(map(abs, self._weights(place.target)), default=0.0) * len(changes)
            if 0 < bound < kind.smallest_subnormal:
                self.notes.append(_small(place, bound, self.dtype.name))
            return
        if not bound:
            self.notes.append(
                f"{place.target}: the result is zero, but the adapters' changes have entries of up to {given:.2g}"
            )
        else:
            self.notes.append(_small(place, bound, self.dtype.name))

    def _thin(self, place: AlignedPlace) -> bool:
        return len(place.shape) > 1 and all(isinstance(update, LoRA) for update in place.all_updates)

    def _lazily(self, place: AlignedPlace, changes: Sequence[Change | None]) -> Update:
        """Return a dense difference that is computed when it is read.

        Computing all differences at once would need as much memory as the model.
        """
        from ..io.computed import computed, rounded

        first = next(change for change in changes if change is not None)
        lead = (first.experts,) if first.experts is not None else ()
        shape, bias = (*lead, *place.shape), self._bias(place, changes)
        self._look(place, changes, None)

        def make() -> Array:
            import numpy as np

            # If the result's dtype has 16 bits, compute the result in float32, and round it once at the end.
            kind = self.dtype.array if self.dtype.name in ("F32", "F64") else np.float32
            D = np.empty((first.experts or 1, place.shape[0], math.prod(place.shape[1:])), kind)
            with errors_at(place.target), one_blas_thread():
                for one, (method, at, deltas) in zip(D, self._standings(place, changes), strict=True):
                    self._into(one, method, place, at, deltas)
                # Round inside `errors_at`, so that the error message names the target.
                return rounded(D.reshape(shape), self.dtype)

        d = None if bias is None else rounded_lazy(bias, self.dtype)
        return Dense(D=computed(shape, self.dtype, make), d=d)  # type: ignore[arg-type]

    def _standings(
        self, place: AlignedPlace, changes: Sequence[Change | None], census: Census | None = None
    ) -> Iterator[tuple[Combiner, FormulaContext, list[Delta]]]:
        """Yield (combiner, context, changes) for the weight, or for each weight in a stack of experts."""
        method = self.asked.method(place.target)
        for number, row in enumerate(side_by_side(changes)):
            present = tuple(t for t, delta in enumerate(row) if delta is not None)
            at = self._standing(place, present, number if place.target.stacked else None, census)
            yield method, at, [delta for delta in row if delta is not None]

    def _matrix(self, method: Combiner, place: AlignedPlace, at: FormulaContext, deltas: list[Delta]) -> Delta:
        """Return the combined change of a weight. If only statistics are collected, callers must ignore the result."""
        import numpy as np

        from .combiners._combiner import whole

        weights = self._present(place, at)
        if len(place.shape) == 1:
            return whole(method.vector(np.stack([delta.dense()[:, 0] for delta in deltas]), weights, at)[:, None])
        if at.census.counting and isinstance(method, Entrywise):
            method.count(Blocks(deltas), weights, at)
            return deltas[0]
        return method.matrix(deltas, weights, at)

    def _into(self, D: Array, method: Combiner, place: AlignedPlace, at: FormulaContext, deltas: list[Delta]) -> None:
        """Write the combined change of a weight to D `[out, in * k]`."""
        if not isinstance(method, Entrywise) or len(place.shape) == 1:
            D[...] = self._matrix(method, place, at, deltas).dense()
            return
        for rows, block in method.rows(Blocks(deltas), self._present(place, at), at):
            D[rows] = block

    def _present(self, place: AlignedPlace, at: FormulaContext) -> Array:
        import numpy as np

        weights = self._weights(place.target)
        return np.array([weights[t] for t in at.present])

    def _cut(
        self, method: Combiner, place: AlignedPlace, at: FormulaContext, deltas: list[Delta]
    ) -> tuple[Delta, float, float]:
        """Combine the changes of one weight, and cut the combined change to the requested rank.

        Return (combined change, its norm before the cut, norm of the cut's error). Without a cut, both norms are 0.
        """
        from .lowrank import svd

        uncut = self.rank is None or len(place.shape) == 1
        if uncut or not isinstance(method, Entrywise):
            delta = self._matrix(method, place, at, deltas)
            if uncut or (self.rank == FIT and delta.rest is None):
                return delta, 0.0, 0.0
            if delta.rest is None:
                U, S, Vh = svd(delta)
                rank = self._rank_of(deltas)
                lost = math.sqrt(float((S[rank:] ** 2).sum()))
                return Delta(*balanced(U[:, :rank], S[:rank], Vh[:rank])), math.hypot(*S), lost
            D = delta.dense()
        else:
            pair = self._dense_result(method, place, at, deltas)
            if pair is None:
                rows = lambda: method.rows(Blocks(deltas), self._present(place, at), at)  # noqa: E731
                return _approximation(*streamed(rows, deltas[0].shape, self._rank_of(deltas), self.seed))
            D = pair
        return _approximation(*approximated(D, self._rank_of(deltas), self.seed))

    def _dense_result(
        self, method: Combiner, place: AlignedPlace, at: FormulaContext, deltas: list[Delta]
    ) -> Array | None:
        """Return the combined change of one weight as an array; None if the array would exceed `MEMORY`."""
        import numpy as np

        (out, columns), size = deltas[0].shape, self.dtype.itemsize
        if out * columns * size > MEMORY:
            return None
        # `approximated` decomposes small matrices exactly, in float64. Compute small results in float64 too, so that
        # they are not rounded to float32 before the decomposition.
        kind = np.float64 if self.dtype.name == "F64" or min(out, columns) <= SMALL else np.float32
        D = np.empty((out, columns), kind)
        self._into(D, method, place, at, deltas)
        return D

    def _rank_of(self, deltas: Sequence[Delta]) -> int:
        """Return the rank to which `_cut` cuts the combined change of one weight."""
        if isinstance(self.rank, int):
            return min(self.rank, *deltas[0].shape)
        largest = max((each.rank for each in deltas if each.rest is None), default=0)
        return min(largest or self.fallback or min(deltas[0].shape), *deltas[0].shape)

    def _bias(
        self, place: AlignedPlace, changes: Sequence[Change | None], census: Census | None = None
    ) -> Array | None:
        """Return the combined change of the bias, `[out]` or `[e, out]`; None if no adapter changes it."""
        import numpy as np

        method = self.asked.method(place.target)
        biases = [None if change is None or not change.changes_bias else change.bias() for change in changes]
        present = tuple(t for t, bias in enumerate(biases) if bias is not None)
        if not present:
            return None
        weights = np.array([self._weights(place.target)[t] for t in present])
        stacked = np.stack([np.atleast_2d(bias) for bias in biases if bias is not None], 1)
        rows_of_bias = [
            method.vector(
                each, weights, self._standing(place, present, e if place.target.stacked else None, census, bias=True)
            )
            for e, each in enumerate(stacked)
        ]
        return np.stack(rows_of_bias) if place.target.stacked else rows_of_bias[0]

    def _stored(self, place: AlignedPlace, deltas: Sequence[Delta] | None, bias: Array | None) -> Update:
        """Return the combined change as an update: a LoRA, or a dense difference.

        The update is dense if the change has no low-rank factors. It is also dense if the factors would take more than
        twice the space of the weight and `rank` is not `fit`.
        """
        hold = self.hold
        if deltas is None:
            return dense(place.target, place.shape, None, bias, self.dtype, hold)
        wide = _wide(max(delta.rank for delta in deltas), deltas[0].shape) and self.rank != FIT
        if any(delta.rest is not None for delta in deltas) or wide:
            return dense(place.target, place.shape, [delta.dense() for delta in deltas], bias, self.dtype, hold)
        return low_rank(place.target, place.shape, [_reduced(delta) for delta in deltas], bias, self.dtype, hold)

    def _standing(
        self, place: AlignedPlace, present: tuple[int, ...], expert: int | None, census: Census | None = None,
        bias: bool = False,
    ) -> FormulaContext:  # fmt: skip
        part = ("bias" if bias else "weight") + ("" if expert is None else f" {expert}")
        scalings = tuple(_scaling(place.updates[t]) for t in present)
        counted = self.census if census is None else census
        at = FormulaContext(
            place.target,
            place.shape,
            present,
            part,
            self.seed,
            self.asked.each_at(place.target),
            scalings,
            counted,
            self.asks,
        )
        learned = None if self.learned is None else self.learned[place.target]
        at = replace(at, depth=self.asked.depths.known(place.target), learned=learned)
        base = self.base
        return at if base is None else replace(at, base=lambda: base.at(place.target, expert, bias))

    def _weights(self, target: Target) -> list[float]:
        weights = self.asked.weights_at(target)
        if self.learned is None:
            return [weight * self.factor for weight in weights]
        method = self.asked.method(target)
        if isinstance(method, Learned) and method.by_part:
            return weights
        return [w * float(c) for w, c in zip(weights, self.learned[target], strict=True)]

    def _trial(self, read: Sequence[Adapter], method: Learned) -> WeightTrial:
        """Return the functions with which a learning combiner evaluates coefficients."""
        import numpy as np

        by_target = {place.target: place for place in self.aligned}

        def combined(coefficients: Mapping[Target, Array]) -> Adapter:
            # Set `self.learned`, so that a trial runs the same code as the final result.
            self.learned = coefficients
            return Adapter({place.target: self._at(place)[0] for place in self.aligned}, read[0].base)

        def products(target: Target, gradient: object) -> Array:
            given: Any = gradient
            G = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, np.float64)
            return method.products(by_target[target].changes(), self.asked.weights_at(target), G)

        assert self.data is not None
        wanted = f"{method.data}{'; or per=task' if 'per' in method.parameters() else ''}"
        return WeightTrial(
            [place.target for place in self.aligned], len(read), self.seed, combined, self.data, products,
            lambda target: by_target[target].changes(), self.asked.depths.known, self.asked.each, wanted,
        )  # fmt: skip

    def _statistics(
        self, method: Combiner, read: Sequence[Adapter], done: Mapping[Target, tuple[Update, ...]]
    ) -> Callable[..., object] | None:
        data = self.data
        if data is None or not method.sequential:
            return data
        # `data` gets an adapter with the targets finished so far. The adapter's updates are a read-only view of `done`.
        # The view grows with `done`, so no target needs a copy of `done`.
        so_far = Adapter(MappingProxyType(done), read[0].base)
        return lambda position, path: data(position, path, so_far if done else None)


def _size(X: Array) -> float:
    """Return the largest magnitude in an array, or 0 if the array is empty."""
    import numpy as np

    return float(np.abs(X).max()) if X.size else 0.0


def _bound(delta: Delta) -> float:
    """Return an upper bound for the magnitudes of a change's entries."""
    rest = 0.0 if delta.rest is None else _size(delta.rest)
    return delta.rank * _size(delta.B) * _size(delta.A) + rest


def _wide(rank: int, shape: Shape) -> bool:
    """Whether factors of this rank take more than twice the space of the weight `[out, in, *k]`."""
    out, columns = shape[0], math.prod(shape[1:])
    return rank * (out + columns) > 2 * out * columns


def _small(place: AlignedPlace, bound: float, dtype: str) -> str:
    return (
        f"{place.target}: entries up to {bound:.2g} are zero in {dtype}; dtype='F64' (--dtype F64) can represent them"
    )


def _bytes(place: AlignedPlace) -> int:
    """Return the number of bytes that a target's weight has in float32, for progress reports."""
    return 4 * math.prod(place.shape)


def _approximation(parts: Decomposition, norm: float, lost: float) -> tuple[Delta, float, float]:
    return Delta(*balanced(*parts)), norm, lost


def _reduced(delta: Delta) -> tuple[Array, Array]:
    """Return B and A. If their rank is above min(out, in * k), reduce it to min(out, in * k), which loses nothing."""
    from .lowrank import svd

    return (delta.B, delta.A) if delta.rank <= min(delta.shape) else balanced(*svd(delta))


def _scaling(updates: Sequence[Update]) -> float | None:
    """Return the scaling of an adapter's only update at a target; None if there are several updates, or no scaling."""
    return getattr(updates[0], "scaling", None) if len(updates) == 1 else None


@checks_types
def combine(
    adapters: Sequence[Source],
    method: str = "linear",
    weights: Sequence[Setting] | None = None,
    *,
    base: Base | None = None,
    rank: int | str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    compat: str | None = None,
    data: Callable[..., object] | None = None,
    each: Sequence[Mapping[str, Value]] | None = None,
    disjoint: bool = False,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
    workers: int | None = None,
    report: Report | None = None,
    before: Callable[[Adapter], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **parameters: Setting,
) -> Adapter:
    """Combine several adapters into one.

    Args:
        adapters: adapters or their paths. They may have different additive methods, ranks and targets. At each target,
            the adapters that lack the target are ignored.
        method: a name in `COMBINERS`. A combiner that contains another combiner may be written with the inner
            combiner's name: `knots_ties` is `knots` with `ties` inside.
        weights: one weight per adapter; default: 1. A weight is a number, a list of numbers from the first layer to the
            last, or a mapping from globs of targets to numbers or lists. The first glob that matches a target is used;
            if none matches, the weight is 1.
        base: the base. Names and layouts are resolved against the base, and some methods need its weights.
        rank: the rank to which the result is cut at each target; default: the result is not cut. The cut is the best
            approximation of this rank; for large matrices without low-rank factors, it is only close to the best.
            With `"fit"`, a result without low-rank factors is cut to the largest rank that the adapters have at the
            target. A result with low-rank factors is not cut, and its rank is the sum of the adapters' ranks. So every
            matrix gets a LoRA.
        dtype: the dtype of computed results; default: float64 if any tensor is float64, else float32.
        seed: the seed of random draws; a draw depends only on the seed, the target and the adapter's index.
        compat: `mergekit` or `peft`, to use the method names and the default parameters of that tool.
        data: a function that provides samples or scores, for methods that need them; see `COMBINERS[name].data`.
            `TextData` creates such a function from texts.
        each: parameters that apply to one adapter only, one mapping per adapter, such as `[{"density": 0.5}, {}]`.
        disjoint: whether to allow adapters that have no target in common.
        rename: rules for names, each `FROM=TO` or `@FILE`, for all adapters. The first rule that matches a target's
            name is used.
        strict_base: whether to refuse a base that differs from the base that an adapter records.
        workers: the number of targets to compute in parallel; default: one per processor, at most 16. All workers
            together use at most 256 MB, or more if a single target's result needs more. The result does not depend on
            the number of workers. Methods that use `data` have one worker.
        report: a function that is called with a `Cut` for each target whose result was cut to a rank. The `Cut`
            contains the norms of the result and of the error.
        before: a function that is called with an adapter before any computation. The adapter has the targets, methods,
            shapes and dtypes of the result, but its tensors cannot be read. If the function raises an error, such as a
            format's `Unrepresentable`, the combination stops.
        progress: a function that is called with (bytes of finished targets, total bytes). The bytes of a target are the
            size of its weight in float32.
        parameters: parameters of the method. Like a weight, each parameter is a value, a list of values from the first
            layer to the last, or a mapping from globs of targets to values or lists.

    Returns:
        the combined adapter: LoRA updates if the results have low-rank factors, else dense differences. If the method's
        results are always dense and `rank` is not set, each result is computed when it is read. A target's result may
        be zero, or become zero in its dtype, although the adapters' changes are not zero. Then `warnings` in the last
        step of the lineage has a warning about the target.

    Raises:
        CheckFailed: the base differs from the base that an adapter records, and `strict_base` is set.
        Unsupported: the method or the tool in `compat` is unknown.
        UsageError: weights, parameters or data do not fit the method or the adapters; the adapters have no target in
            common; or the rank is larger than possible.
        NotMergeable: a method does not change weights.
        ShapeMismatch: the adapters were made for different weights.
        Malformed: a tensor contains a NaN or an infinity.
    """
    adapters = listed(adapters)
    each = None if each is None else list(each)
    check_count(workers, "workers", "workers=N")
    name, values = resolved(method, compat, len(adapters))
    values |= parameters
    peers_rank = cast("int | str | None", values.pop("rank", None))
    cut = peers_rank if rank is None else rank
    # Some combiners, such as `ctm`, compute factors of a given rank, and therefore have a parameter `rank`. Pass the
    # rank to such a combiner, and do not cut its result again.
    if "rank" in COMBINERS[name].parameters():
        values, cut = values | ({} if rank in (None, FIT) else {"rank": rank}), FIT if rank == FIT else None
    _check_given(name, adapters, base, data, seed)
    # Check one value of each parameter, to report an invalid value before any adapter is read.
    first = combiner_of(COMBINERS[name], {key: one_of(value, key) for key, value in values.items()})
    summing = first.sums([1.0] * len(adapters)) is not None
    # A weighted sum that is not cut consists of the adapters' updates, so `places` does not have to make the updates
    # additive. A sum that is cut is computed like any other result.
    lower = None if summing and cut is None else "combined"
    base = None if base is None else opened(base)
    given = [source_adapter(source, base) for source in adapters]
    read, aligned = places(given, base=base, lower=lower, disjoint=disjoint, rename=rename, strict_base=strict_base)
    check_rank(rank, aligned)
    fallback = max((number for adapter in given for number in adapter.ranks), default=None)
    stage(f"combining {len(read)} adapters by {name}")
    asked = CombineParameters(
        name, values, weights, each, aligned, len(read), () if base is None else base.tensors
    )  # fmt: skip
    updates_here = {place.target: place.updates[0] for place in aligned}
    seen = None if base is None or not first.based else Weights(updates_here, base)
    factor = 1.0
    if compat == "peft":
        exact, factor = peft_result(method, read, rank if isinstance(rank, int) else None)
        cut = cut if exact is None and rank == FIT else exact
    kind = result_type(read, dtype)
    work = Evaluation(asked, aligned, kind, cut, seed, data, seen, factor, fallback, progress, workers)
    given_record: dict[str, JsonValue] = {
        "method": name, "parameters": asked.record(first), "weights": asked.weights, "seed": seed,
        "each": [dict(values_of_one) for values_of_one in asked.each], "rank": cut, "compat": compat,
    }  # fmt: skip
    record = {key: value for key, value in given_record.items() if value not in (None, [])}
    if before is not None:
        # Pass the outline with the result's lineage, because formats read the model's family from the lineage.
        before(of_several(read, work.outline(), "combine", **record))
    updates = work.updates(read)
    for lost in work.cuts if report is not None else ():
        report(lost)  # type: ignore[misc]
    notes = [*asked.notes, *sorted(work.notes)]
    record |= {"warnings": notes} if notes else {}
    return of_several(read, updates, "combine", **record)


def _check_given(name: str, adapters: Sequence[Source], base: Base | None, data: object, seed: object) -> None:
    """Check that the method accepts the arguments; see `combine`."""
    cls = COMBINERS[name]
    if not adapters:
        raise UsageError("no adapter was given", cure=PASS_AN_ADAPTER)
    low, high = cls.takes
    if not low <= len(adapters) <= (len(adapters) if high is None else high):
        counts = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        raise UsageError(
            f"{name} takes {counts} adapters, not {len(adapters)}",
            cure="Change the number of adapters, or choose another --method (method=)",
        )
    if cls.data is not None and not callable(data):
        texts = "Pass a file of texts with --data FILE and --base BASE, or pass" if cls.learns is not None else "Pass"
        raise UsageError(f"{name} needs data", where="data", cure=f"{texts} data=, {cls.data}")
    if cls.data is None and data is not None:
        raise UsageError(
            f"{name} does not use data", where="data", cure="Omit --data (data=), or choose another method"
        )
    if cls.based and base is None:
        raise UsageError(f"{name} needs the weights of the base", where="base", cure=PASS_BASE)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(
            f"seed {seed!r} is not a whole number of at least 0", where="seed", cure="Pass --seed 0 (seed=0), or more"
        )


def check_rank(rank: object, aligned: Sequence[AlignedPlace]) -> None:
    """Check that at least one weight is large enough for the rank.

    Raises:
        UsageError: the rank is not None, `FIT`, or a whole number from 1 to the largest rank that a weight can have.
    """
    if rank is None or rank == FIT:
        return
    most = max(min(place.shape[0], math.prod(place.shape[1:])) for place in aligned)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        why = f"the rank is {rank!r}, but the weights have at most rank {most}"
        raise UsageError(why, where="rank", cure=f"Choose a rank from 1 to {most}")
