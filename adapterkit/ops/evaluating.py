"""Evaluate a combiner's formula at all targets; dense results are computed when they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..errors import UsageError
from ..io.computed import Spool, held
from ..methods.dense import Dense
from ..methods.lora import LoRA
from .algebra import summed_at
from .alignment import side_by_side
from .blocks import Blocks
from .building import balanced, dense, low_rank
from .census import Census
from .combiners._entrywise import Entrywise
from .combiners._learned import Learned, WeightTrial
from .context import FormulaContext
from .differences import errors_at
from .lowering import Delta
from .outline import blank, unknown
from .prefetch import MEMORY, ahead, most_workers, one_blas_thread
from .resizing import Cut
from .sketching import SMALL, approximated, streamed

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..core.updates import Update
    from ..io.computed import Array
    from ..io.lazy import DType, Shape
    from .alignment import AlignedPlace
    from .at_base import Weights
    from .building import Hold
    from .combiners._combiner import Combiner
    from .lowering import Change
    from .parameters import Asked
    from .sketching import Decomposition

FIT = "fit"
"""The value of `rank` that cuts only results without low-rank factors, to the largest rank of the inputs."""


SAMPLED = 16
"""The number of targets to sample for the first estimate of a threshold; a bad estimate only costs time."""


class Evaluation:
    """Evaluates a combiner's formula at all targets, several in parallel.

    Attributes:
        cuts: a `Cut` for each target whose result was cut to a rank.
        notes: a sentence for each target whose result is too small for its dtype, or is zero although the changes are
            not.
    """

    def __init__(
        self, asked: Asked, found: Sequence[AlignedPlace], dtype: DType, rank: int | str | None, seed: int,
        data: Callable[..., object] | None, base: Weights | None, factor: float = 1.0, fallback: int | None = None,
        progress: Callable[[int, int], object] | None = None, workers: int | None = None,
    ) -> None:  # fmt: skip
        self.asked, self.found, self.dtype, self.rank, self.seed, self.data = asked, found, dtype, rank, seed, data
        self.base, self.factor, self.fallback, self.progress = base, factor, fallback, progress
        # The caller's `data` function may not be thread-safe.
        self.workers = 1 if data is not None else workers or most_workers()
        self.census = Census()
        self.census.votes_by(self._pass)
        self.cuts: list[Cut] = []
        self.notes: list[str] = []
        self.learned: Mapping[Target, Array] | None = None
        self.asks: Callable[..., object] | None = None
        self.hold: Hold = held

    def updates(self, read: Sequence[Adapter]) -> dict[Target, tuple[Update, ...]]:
        """Return the combined updates of every target."""
        method = self.asked.method(self.found[0].target)
        if isinstance(method, Learned):
            self.learned = method.learn(self._trial(read, method))
        made: dict[Target, tuple[Update, ...]] = {}
        if not isinstance(method, Learned):
            self.asks = self._asking(method, read, made)
        with one_blas_thread():
            if self.asked.counts:
                self._count()
            self._fill(made)
        return made

    def outline(self) -> dict[Target, tuple[Update, ...]]:
        """Return updates with the methods, shapes and dtypes of the result, without computing it.

        The tensors cannot be read.

        Ranks are upper bounds.
        """
        return blank({place.target: self._outline_at(place) for place in self.found})

    def _outline_at(self, place: AlignedPlace) -> tuple[Update, ...]:
        method = self.asked.method(place.target)
        if self._summed(place, method) is not None:
            return summed_at(place, [1.0] * len(place.updates), stacking=False)
        changes = [change for change in place.changes() if change is not None]
        lead = (changes[0].experts or 1,) if place.target.stacked else ()
        fields: dict[str, Any] = {}
        weighted = any(change.changes_weight for change in changes)
        bias = unknown((*lead, place.shape[0]), self.dtype) if any(c.changes_bias for c in changes) else None
        # If the result may lack low-rank factors, outline it as dense. A format without dense updates then refuses it,
        # and the error asks for a cut. The cut does not change results that have low-rank factors.
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
        """Return the adapters' factors if the result is a plain sum of updates that needs no computing, else None."""
        exact = self.rank is None or (self.rank == FIT and self._thin(place))
        return method.sums(self._weights(place.target)) if exact else None

    def _fill(self, made: dict[Target, tuple[Update, ...]]) -> None:
        total = sum(map(_bytes, self.found))
        # Write only the final result to a temporary file: a method that learns weights computes and frees hundreds of
        # trial results.
        self.hold = Spool().held
        if self.workers == 1:
            results: Iterator[tuple[tuple[Update, ...], Cut | None]] = map(self._placed, self.found)
            self._take(results, made, total)
            return
        with ahead(self._placed, self.found, self.workers, self._cost) as several:
            self._take(several, made, total)

    def _take(
        self, results: Iterator[tuple[tuple[Update, ...], Cut | None]], made: dict[Target, tuple[Update, ...]],
        total: int,
    ) -> None:  # fmt: skip
        done = 0
        for place, (updates, cut) in zip(self.found, results, strict=True):
            made[place.target] = updates
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
        found = [[update.A for update in updates if isinstance(update, LoRA)] for updates in place.updates]
        return [sum(int(A.shape[int(place.target.stacked)]) for A in each) for each in found]

    def _placed(self, place: AlignedPlace) -> tuple[tuple[Update, ...], Cut | None]:
        with errors_at(place.target):
            return self._at(place)

    def _count(self) -> None:
        if self.asked.varies:
            why = "a setting that applies to the whole adapter cannot differ between targets"
            raise UsageError(why, where="scope", cure="Set scope=tensor, or one value for all targets")
        stages = self.asked.method(self.found[0].target).stages
        # Sampling a few targets saves time only if there are many more targets.
        self.census.partial = len(self.found) >= 2 * SAMPLED
        self.census.run(lambda few: self._pass(self.census, few), stages)

    def _pass(self, census: Census, few: bool = False) -> None:
        """Run the formula at all targets, or at a few targets, to collect statistics."""
        # Choose every n-th target, because magnitudes change with the depth in a model.
        chosen = self.found[:: max(len(self.found) // SAMPLED, 1)] if few else self.found

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
        made = [self._cut(method, place, at, deltas) for method, at, deltas in self._standings(place, changes)]
        update = self._stored(place, [delta for delta, _, _ in made], bias)
        self._look(place, changes, [delta for delta, _, _ in made])
        if not any(lost for _, _, lost in made):
            return (update,), None
        norm, error = math.hypot(*(size for _, size, _ in made)), math.hypot(*(lost for _, _, lost in made))
        rank = max(delta.rank for delta, _, _ in made)
        cut = Cut(str(place.target), update.method, min(made[0][0].shape), rank, norm, error)
        return (update,), cut

    def _look(self, place: AlignedPlace, changes: Sequence[Change | None], made: Sequence[Delta] | None) -> None:
        """Add a note if a result is zero, or becomes zero in its dtype, although the changes are not."""
        import numpy as np

        kind = np.finfo(np.float64 if self.dtype.name == "F64" else np.float32)
        found = 0.0 if made is None else max(map(_bound, made))
        sizes = [_size(X) for d in made or () for X in (d.B, d.A, d.rest) if X is not None]
        small = max(sizes, default=0.0) < kind.smallest_subnormal
        if found and not small:
            return  # Most results return here, without loading the changes again.
        # Use an upper bound of the entries, which needs no product of factors, to prove that all entries are too small.
        given = max((_bound(d) for c in changes if c is not None and c.changes_weight for d in c.deltas()), default=0.0)
        if not given:
            return
        if made is None:
            found = given * max(map(abs, self._weights(place.target)), default=0.0) * len(changes)
            if 0 < found < kind.smallest_subnormal:
                self.notes.append(_small(place, found, self.dtype.name))
            return
        if not found:
            self.notes.append(f"{place.target}: the result is zero; the largest change there is at most {given:.2g}")
        else:
            self.notes.append(_small(place, found, self.dtype.name))

    def _thin(self, place: AlignedPlace) -> bool:
        return len(place.shape) > 1 and all(isinstance(update, LoRA) for update in place.all_updates)

    def _lazily(self, place: AlignedPlace, changes: Sequence[Change | None]) -> Update:
        """Return a dense difference that is computed when it is read.

        All differences together are as large as the model.
        """
        from ..io.computed import computed, rounded

        first = next(change for change in changes if change is not None)
        lead = (first.experts,) if first.experts is not None else ()
        shape, bias = (*lead, *place.shape), self._bias(place, changes)
        self._look(place, changes, None)

        def make() -> Array:
            import numpy as np

            # Compute results of 16 bits in float32, and round once when the result is stored.
            kind = self.dtype.array if self.dtype.name in ("F32", "F64") else np.float32
            D = np.empty((first.experts or 1, place.shape[0], math.prod(place.shape[1:])), kind)
            with errors_at(place.target), one_blas_thread():
                for one, (method, at, deltas) in zip(D, self._standings(place, changes), strict=True):
                    self._into(one, method, place, at, deltas)
                # Round inside `errors_at`, so that the error message names the target.
                return rounded(D.reshape(shape), self.dtype)

        d = None if bias is None else held(bias, self.dtype)
        return Dense(D=computed(shape, self.dtype, make), d=d)  # type: ignore[arg-type]

    def _standings(
        self, place: AlignedPlace, changes: Sequence[Change | None], census: Census | None = None
    ) -> Iterator[tuple[Combiner, FormulaContext, list[Delta]]]:
        """Yield (combiner, context, changes) for the weight, or for each expert's weight of a stack."""
        method = self.asked.method(place.target)
        for number, row in enumerate(side_by_side(changes)):
            present = tuple(t for t, delta in enumerate(row) if delta is not None)
            at = self._standing(place, present, number if place.target.stacked else None, census)
            yield method, at, [delta for delta in row if delta is not None]

    def _matrix(self, method: Combiner, place: AlignedPlace, at: FormulaContext, deltas: list[Delta]) -> Delta:
        """Return the combined change of a weight."""
        import numpy as np

        from .combiners._changes import whole

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
        for rows, made in method.rows(Blocks(deltas), self._present(place, at), at):
            D[rows] = made

    def _present(self, place: AlignedPlace, at: FormulaContext) -> Array:
        import numpy as np

        weights = self._weights(place.target)
        return np.array([weights[t] for t in at.present])

    def _cut(
        self, method: Combiner, place: AlignedPlace, at: FormulaContext, deltas: list[Delta]
    ) -> tuple[Delta, float, float]:
        """Return the combined change, cut to the requested rank; its norm before the cut; and the norm of the error."""
        from .lowrank import svd

        uncut = self.rank is None or min(deltas[0].shape) == 1
        if uncut or not isinstance(method, Entrywise):
            made = self._matrix(method, place, at, deltas)
            if uncut or (self.rank == FIT and made.rest is None):
                return made, 0.0, 0.0
            if made.rest is None:
                U, S, Vh = svd(made)
                rank = self._rank_of(deltas)
                lost = math.sqrt(float((S[rank:] ** 2).sum()))
                return Delta(*balanced(U[:, :rank], S[:rank], Vh[:rank])), math.hypot(*S), lost
            D = made.dense()
        else:
            held = self._held(method, place, at, deltas)
            if held is None:
                rows = lambda: method.rows(Blocks(deltas), self._present(place, at), at)  # noqa: E731
                return _approximation(*streamed(rows, deltas[0].shape, self._rank_of(deltas), self.seed))
            D = held
        return _approximation(*approximated(D, self._rank_of(deltas), self.seed))

    def _held(self, method: Combiner, place: AlignedPlace, at: FormulaContext, deltas: list[Delta]) -> Array | None:
        """Return the combined change of one weight as an array; None if the array would exceed `MEMORY`."""
        import numpy as np

        (out, columns), size = deltas[0].shape, self.dtype.itemsize
        if out * columns * size > MEMORY:
            return None
        # Keep small results in float64, because LAPACK decomposes these exactly.
        kind = np.float64 if self.dtype.name == "F64" or min(out, columns) <= SMALL else np.float32
        D = np.empty((out, columns), kind)
        self._into(D, method, place, at, deltas)
        return D

    def _rank_of(self, deltas: Sequence[Delta]) -> int:
        """Return the rank to which the combined change of one weight is cut."""
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
        found = [None if change is None or not change.changes_bias else change.bias() for change in changes]
        present = tuple(t for t, bias in enumerate(found) if bias is not None)
        if not present:
            return None
        weights = np.array([self._weights(place.target)[t] for t in present])
        stacked = np.stack([np.atleast_2d(bias) for bias in found if bias is not None], 1)
        made = [
            method.vector(
                each, weights, self._standing(place, present, e if place.target.stacked else None, census, bias=True)
            )
            for e, each in enumerate(stacked)
        ]
        return np.stack(made) if place.target.stacked else made[0]

    def _stored(self, place: AlignedPlace, found: Sequence[Delta] | None, bias: Array | None) -> Update:
        """Return the combined change as an update: a LoRA if that takes less space, else a dense difference."""
        hold = self.hold
        if found is None:
            return dense(place.target, place.shape, None, bias, self.dtype, hold)
        wide = _wide(max(delta.rank for delta in found), found[0].shape) and self.rank != FIT
        if any(delta.rest is not None for delta in found) or wide:
            return dense(place.target, place.shape, [delta.dense() for delta in found], bias, self.dtype, hold)
        return low_rank(place.target, place.shape, [_reduced(delta) for delta in found], bias, self.dtype, hold)

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

        by_target = {place.target: place for place in self.found}

        def combined(coefficients: Mapping[Target, Array]) -> Adapter:
            # Set `self.learned`, so that a trial runs the same code as the final result.
            self.learned = coefficients
            return Adapter({place.target: self._at(place)[0] for place in self.found}, read[0].base)

        def products(target: Target, gradient: object) -> Array:
            given: Any = gradient
            G = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, np.float64)
            return method.products(by_target[target].changes(), self.asked.weights_at(target), G)

        assert self.data is not None
        wanted = f"{method.data}{'; or per=task' if 'per' in method.parameters() else ''}"
        return WeightTrial(
            [place.target for place in self.found], len(read), self.seed, combined, self.data, products,
            lambda target: by_target[target].changes(), self.asked.depths.known, self.asked.each, wanted,
        )  # fmt: skip

    def _asking(
        self, method: Combiner, read: Sequence[Adapter], done: Mapping[Target, tuple[Update, ...]]
    ) -> Callable[..., object] | None:
        data = self.data
        if data is None or not method.sequential:
            return data
        # Give the caller a view of the growing dict of finished targets, so that no dict is copied for each target.
        so_far = Adapter(MappingProxyType(done), read[0].base)
        return lambda position, path: data(position, path, so_far if done else None)


def _size(X: Array) -> float:
    """Return the largest magnitude."""
    import numpy as np

    return float(np.abs(X).max()) if X.size else 0.0


def _bound(delta: Delta) -> float:
    """Return an upper bound of the magnitudes of a change's entries."""
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
    """Return the size of a target's weight in float32, for reports of progress."""
    return 4 * math.prod(place.shape)


def _approximation(found: Decomposition, norm: float, lost: float) -> tuple[Delta, float, float]:
    return Delta(*balanced(*found)), norm, lost


def _reduced(delta: Delta) -> tuple[Array, Array]:
    """Return B and A; if their rank is larger than the weight's smaller side, cut it without loss."""
    from .lowrank import svd

    return (delta.B, delta.A) if delta.rank <= min(delta.shape) else balanced(*svd(delta))


def _scaling(updates: Sequence[Update]) -> float | None:
    """Return the scaling of an adapter's only update at a target; None for several updates, or without a scaling."""
    return getattr(updates[0], "scaling", None) if len(updates) == 1 else None
