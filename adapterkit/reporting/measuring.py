"""Compute the measurements of a report. `Effect`, `Relation`, `MergedShare` and `Measurements` define each measurement.

Low-rank changes are measured from their factors: a QR decomposition of each factor and an SVD of the small core give
`U S V^T`. Norms, inner products and overlaps of subspaces are computed from small products of U, S and V. The whole
product `B @ A` is computed only to compare a change with a dense change or with the merged model, and to count
intruders.

Signs and values of single elements are measured only in a block of the weight: the elements at `SIDE` rows and `SIDE`
columns, which are evenly spread. The block is small enough to be computed as a dense matrix. A share that is estimated
from the block's 25,600 elements has a standard error of about 0.3 percentage points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError
from ..io.lazy import files_kept_open
from ..io.stages import stage
from ..ops.alignment import AlignedPlace, places, side_by_side
from ..ops.comparison import effective_rank, lowered
from ..ops.lowrank import core
from ..ops.prefetch import one_blas_thread
from ..ops.sketching import exact
from .grid import Cell, cells

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.computed import Array
    from ..io.lazy import DType
    from ..io.strict_json import JsonValue
    from ..ops.lowering import Change, Delta, Weights

SIDE = 160
"""The largest number of rows in the measured block, and the largest number of columns."""

SHOWN = 64
"""The largest number of singular values to store for a target."""

LARGEST_EXACT = 1024
"""The SVD of a dense change is computed only if the smaller side of the change is at most this long. A larger SVD takes
over a second."""

EXPERTS = 8
"""In a stack of experts, only the first `EXPERTS` experts are used to measure single elements and to compare weights.
Norms and ranks of changes are measured for all experts."""

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""The probabilities of the quantiles in `Effect.quantiles`."""

INTRUDING, INTRUDER_COSINE = 10, 0.6
"""The first ten left singular vectors of a tuned weight (the base's weight plus the change) are checked. A vector is an
intruder if its absolute cosine with each left singular vector of the base's weight is below 0.6 (Shuttleworth et al.
2024, arXiv:2410.21228)."""

INTRUDER_BUDGET = 6e9
"""The limit for the work of finding intruders. The work is the sum of `2 * smaller_side**2 * larger_side` over the
checked weights. The limit allows 15 weights of 576 x 576, which take 3 s. The weights with the largest relative changes
are checked first. The verdict states the number of checked weights."""

INTRUDER_UNIT = 2e7
"""While intruders are counted, the progress bar shows this amount of work as one step. The amount has the unit of
`INTRUDER_BUDGET`. Before intruders are counted, the measurement of each target is one step."""


@dataclass(frozen=True, slots=True)
class Effect:
    """The change that one adapter makes at one target. A field that was not measured is None or empty.

    Attributes:
        adapter: the index of the adapter.
        target: the target as text: its dotted path, followed by `[start:stop]` if it is only some rows of a weight.
        method: the methods of the target's updates, joined by ` + `.
        shape: the shape of the weight, `[out, in, *k]`.
        rank: the rank of the stored factors; None for a dense change.
        scaling: the `scaling` of the target's updates; None if they have no scaling or different scalings.
        norm: the Frobenius norm of the weight's change; for stacked experts, the norm of the whole stack's change.
        bias_norm: the norm of the bias's change.
        spectrum: the first `SHOWN` singular values, largest first; for stacked experts, the singular values of the
            expert with the largest change.
        effective_rank: the exponential of the entropy of the singular values (Roy and Vetterli 2007); for stacked
            experts, the mean over the experts.
        rank_99: how many of the largest singular values are needed for 99 % of the squared norm; for stacked experts,
            the maximum over the experts.
        quantiles: the quantiles of the change's elements in the measured block, at the probabilities `QUANTILES`.
        peak: the largest absolute value in the measured block, divided by the root mean square of the block.
        relative: the change's norm divided by the norm of the base's weight. For stacked experts, both norms include
            only the first `EXPERTS` experts.
        intruders: the number of intruders among the first ten left singular vectors of the tuned weight; see
            `INTRUDING`.
        why: the reason why the change was not measured.
        code: the code of the error that prevented the measurement; `why` is the text of this error.
    """

    adapter: int
    target: str
    method: str
    shape: tuple[int, ...] | None = None
    rank: int | None = None
    scaling: float | None = None
    norm: float | None = None
    bias_norm: float | None = None
    spectrum: tuple[float, ...] = ()
    effective_rank: float | None = None
    rank_99: int | None = None
    quantiles: tuple[float, ...] = ()
    peak: float | None = None
    relative: float | None = None
    intruders: int | None = None
    why: str | None = None
    code: str | None = None

    @property
    def spike(self) -> float | None:
        """The square of the largest singular value, divided by the sum of squares of `spectrum`; None if unknown."""
        if not self.spectrum or not self.norm or self.rank_99 is None:
            return None
        return min(1.0, self.spectrum[0] ** 2 / math.fsum(value * value for value in self.spectrum))


@dataclass(frozen=True, slots=True)
class Relation:
    """A comparison of the changes that two adapters make at one target.

    Attributes:
        first: the index of one adapter.
        second: the index of the other adapter.
        target: the target.
        product: the inner product of the two changes: the sum of their elementwise products.
        cosine: the cosine similarity of the two changes as flattened matrices; None if one change is zero.
        overlap_out: the share of the lower-rank change's output subspace that lies in the other change's output
            subspace, from 0 to 1. For stacked experts, this is the mean over the experts.
        overlap_in: the same share for the input subspaces of the two changes.
        sign_conflict: the share of elements at which the two changes have opposite signs, among the elements of the
            measured block that both adapters change. It is 0.5 for unrelated changes.
        interference: `1 - sum(|a + b|) / sum(|a| + |b|)` over the elements a and b of the two changes in the measured
            block. It is 0.29 for two unrelated changes of equal size.
    """

    first: int
    second: int
    target: str
    product: float
    cosine: float | None
    overlap_out: float | None
    overlap_in: float | None
    sign_conflict: float | None
    interference: float | None


@dataclass(frozen=True, slots=True)
class MergedShare:
    """At one target, the share of the adapters' change that the merged model contains.

    Attributes:
        target: the target.
        kept: the projection of `merged - base` onto the adapters' change, divided by the norm of the adapters' change.
            1 if the merged weight contains the whole change; 0 if it contains none of the change.
        error: the norm of `merged - exact`, divided by the norm of the adapters' change. `exact` is the base's weight
            plus the adapters' change.
        rounded: the value that `kept` would have after a perfect merge, which computes `exact` and rounds it once to
            the merged model's dtype. 1 for dtypes with more than 16 bits.
        dtype: the dtype of the merged weight, such as `BF16`.
    """

    target: str
    kept: float
    error: float
    rounded: float = 1.0
    dtype: str = ""


@dataclass(frozen=True)
class Measurements:
    """All measurements of a report.

    Attributes:
        names: the names of the adapters, in order.
        cells: target -> the row and the column of the target in the pictures.
        effects: one entry per adapter and target.
        relations: one entry per target and pair of adapters that both change the target's weight.
        together: target -> the interference of the changes of all adapters. For two adapters, this is the value of
            `Relation.interference`.
        merged: one entry per target, if a merged model was passed.
        bases: sentences about adapters whose files name a base other than the given base.
        base_why: the reason why the adapters do not fit the given base; None if they fit. A base that does not fit is
            not used.
    """

    names: tuple[str, ...]
    cells: Mapping[str, Cell]
    effects: tuple[Effect, ...]
    relations: tuple[Relation, ...] = ()
    together: Mapping[str, float] = field(default_factory=dict)
    merged: tuple[MergedShare, ...] = ()
    bases: tuple[str, ...] = ()
    base_why: str | None = None

    @cached_property
    def _effects(self) -> dict[int, list[Effect]]:
        by_adapter: dict[int, list[Effect]] = defaultdict(list)
        for effect in self.effects:
            if effect.norm is not None:
                by_adapter[effect.adapter].append(effect)
        return by_adapter

    @cached_property
    def _pairs(self) -> dict[tuple[int, int], list[Relation]]:
        by_pair: dict[tuple[int, int], list[Relation]] = defaultdict(list)
        for each in self.relations:
            by_pair[each.first, each.second].append(each)
        return by_pair

    @cached_property
    def _norms(self) -> list[float]:
        return [math.hypot(*(effect.norm or 0.0 for effect in self.of(at))) for at in range(len(self.names))]

    @cached_property
    def _cosines(self) -> dict[tuple[int, int], float]:
        cosines = {}
        for (a, b), relations in self._pairs.items():
            size = self.norm(a) * self.norm(b)
            if size:
                cosines[a, b] = max(-1.0, min(1.0, math.fsum(each.product for each in relations) / size))
        return cosines

    def of(self, adapter: int) -> list[Effect]:
        """Return the measured effects of one adapter."""
        return self._effects.get(adapter, [])

    def norm(self, adapter: int) -> float:
        """Return the Frobenius norm of all changes of an adapter."""
        return self._norms[adapter]

    def cosine(self, first: int, second: int) -> float | None:
        """Return the cosine similarity of the changes of two adapters over all targets.

        Return None if the adapters have no common target, or if one adapter changes nothing.
        """
        return self._cosines.get((min(first, second), max(first, second)))

    def mean(self, first: int, second: int, name: str) -> float | None:
        """Return the mean of the `Relation` field `name` over the common targets of two adapters; None if unknown."""
        pairs = self._pairs.get((min(first, second), max(first, second)), [])
        known = [value for each in pairs if (value := getattr(each, name)) is not None]
        return math.fsum(known) / len(known) if known else None

    def gini(self, adapter: int) -> float | None:
        """Return the Gini coefficient of the targets' squared norms: 0 if all are equal, near 1 if one dominates."""
        energies = sorted((effect.norm or 0.0) ** 2 for effect in self.of(adapter))
        total, count = math.fsum(energies), len(energies)
        if not total:
            return None
        return math.fsum((2 * at - count - 1) * energy for at, energy in enumerate(energies, 1)) / (count * total)

    def record(self) -> dict[str, JsonValue]:
        """Return the measurements as plain data."""
        pairs = [(a, b) for a in range(len(self.names)) for b in range(a + 1, len(self.names))]
        return {
            "adapters": [
                {"name": name, "norm": self.norm(at), "gini": self.gini(at)} for at, name in enumerate(self.names)
            ],
            "pairs": [
                {
                    "first": a, "second": b, "cosine": self.cosine(a, b),
                    **{name: self.mean(a, b, name) for name in ("overlap_out", "overlap_in", "sign_conflict")},
                    "interference": self.mean(a, b, "interference"),
                }
                for a, b in pairs
            ],
            "effects": [
                {**asdict(each), "spike": each.spike, "layer": self.cells[each.target].layer,
                 "module": self.cells[each.target].module}
                for each in self.effects
            ],
            "relations": [asdict(each) for each in self.relations], "together": dict(self.together),
            "merged": [asdict(each) for each in self.merged], "base_warnings": list(self.bases),
            "base_why": self.base_why,
        }  # fmt: skip


def measure(
    adapters: Sequence[Adapter], names: Sequence[str], *, base: Checkpoint | None = None,
    merged: Checkpoint | None = None, weights: Sequence[float] | None = None, rename: str | Sequence[str] = (),
    progress: Callable[[int, int], object] | None = None,
) -> Measurements:  # fmt: skip
    """Measure adapters, and compare them with each other, with their base and with the merged model.

    Args:
        adapters: the adapters.
        names: one name per adapter.
        base: the base of the adapters. If it is quantized, pass the result of `quant.dequantized`. If the adapters do
            not fit the base, it is not used, and `Measurements.base_why` states the reason.
        merged: the model into which the adapters were merged; needs `base`.
        weights: the weights of the adapters in the merge; 1 each if None.
        rename: rules that rename targets; see `adapterkit.ops.compare`.
        progress: a function that is called after each step with the number of completed steps and the total number of
            steps.

    Raises:
        AdapterkitError: the adapters belong to different models; see `adapterkit.ops.compare`.
    """
    stage("measuring the updates")
    from ..naming.binding.fitting import check_base

    base_why: str | None = None
    bases: tuple[str, ...] = ()
    if base is not None:
        bases = check_base([*zip(names, adapters, strict=True)], base, strict=False)
    try:
        read, aligned = places(adapters, base=base, disjoint=True, rename=rename)
    except AdapterkitError as error:
        if base is None:
            raise
        base_why, base, merged = str(error), None, None
        read, aligned = places(adapters, disjoint=True, rename=rename)
    # Use one BLAS thread: the factors are so small that a second thread saves no time, and its busy waiting slows other
    # programs.
    with files_kept_open(), one_blas_thread():
        return _Measuring(names, aligned, base, merged, list(weights or [1.0] * len(read)), bases, base_why).run(
            progress
        )


class _Measuring:
    """Measure all targets, one after the other, and collect the numbers."""

    def __init__(
        self, names: Sequence[str], aligned: Sequence[AlignedPlace], base: Checkpoint | None, merged: Checkpoint | None,
        weights: Sequence[float], bases: tuple[str, ...], base_why: str | None,
    ) -> None:  # fmt: skip
        self.names, self.aligned, self.factors, self.bases, self.base_why = names, aligned, weights, bases, base_why
        self.base = None if base is None else _weights(aligned, base)
        self.after = None if merged is None or base is None else _weights(aligned, merged)
        self.effects: list[Effect] = []
        self.relations: list[Relation] = []
        self.together: dict[str, float] = {}
        self.merged: list[MergedShare] = []

    def run(self, progress: Callable[[int, int], object] | None) -> Measurements:
        places = len(self.aligned)
        # The work of counting intruders is known only after all changes are measured. Until then, the progress bar
        # assumes the whole `INTRUDER_BUDGET`.
        most = 0 if self.base is None else round(INTRUDER_BUDGET / INTRUDER_UNIT)
        for at, place in enumerate(self.aligned):
            self._at(place)
            if progress is not None:
                progress(at + 1, places + most)
        counts: dict[tuple[int, str], int] = {}
        if self.base is not None:
            stage("comparing singular vectors with the base's")
            chosen = _to_decompose(self.effects, self.aligned)
            total, done = places + sum(cost for _, cost in chosen), places
            for (effect, cost), count in zip(chosen, _intruders(chosen, self.aligned, self.base), strict=True):
                counts[effect.adapter, effect.target] = count
                done += cost
                if progress is not None:
                    progress(done, total)
        effects = [replace(each, intruders=counts.get((each.adapter, each.target))) for each in self.effects]
        where = cells(place.target.path for place in self.aligned)
        named = {str(place.target): where[place.target.path] for place in self.aligned}
        return Measurements(
            tuple(self.names), named, tuple(effects), tuple(self.relations), self.together, tuple(self.merged),
            self.bases, self.base_why,
        )  # fmt: skip

    def _at(self, place: AlignedPlace) -> None:
        target = str(place.target)
        changes: list[Change | None] = []
        for adapter, updates in enumerate(place.updates):
            changes.append(self._change(place, adapter, updates) if updates else None)
        if not any(changes):
            return
        sums = [_Sum() for _ in changes]
        pairs: dict[tuple[int, int], _PairSum] = {}
        whole, after = _Lost(), _MergedSum()
        try:
            for expert, row in enumerate(side_by_side(changes)):
                self._weight(place, expert, row, (sums, pairs, whole, after))
            biases = [None if change is None else change.bias() for change in changes]
        except AdapterkitError as error:
            self.effects += [
                _unmeasured(at, target, place.updates[at], error) for at, change in enumerate(changes) if change
            ]
            return
        for at, change in enumerate(changes):
            if change is not None:
                bias = biases[at]
                size = None if bias is None else math.sqrt(float((bias * bias).sum()))
                self.effects.append(sums[at].effect(at, target, place.updates[at], change.shape, size))
        self.relations += [each.relation(*pair, target) for pair, each in sorted(pairs.items())]
        if whole.moved and sum(change is not None for change in changes) > 1:
            self.together[target] = whole.share
        if after.change:
            self.merged.append(after.merged(target))

    def _change(self, place: AlignedPlace, adapter: int, updates: tuple[Update, ...]) -> Change | None:
        """Return one adapter's change at a target. If it cannot be computed, record the reason and return None."""
        try:
            alone = lowered(AlignedPlace(place.target, (updates,), place.base))
            (change,) = alone.changes()
        except AdapterkitError as error:
            self.effects.append(_unmeasured(adapter, str(place.target), updates, error))
            return None
        return change

    def _weight(self, place: AlignedPlace, expert: int, row: Sequence[Delta | None], into: Any) -> None:
        sums, pairs, whole, after = into
        parts = {at: _MeasuredPart.of(delta) for at, delta in enumerate(row) if delta is not None}
        blocks = {at: part.block() for at, part in parts.items()} if expert < EXPERTS else {}
        W = self._stored(self.base, place, expert)
        for at, part in parts.items():
            sums[at].add(part, blocks.get(at), None if W is None else float((W * W).sum()))
        for first in parts:
            for second in parts:
                if first < second and parts[first].shape == parts[second].shape:
                    pair_sum = pairs.setdefault((first, second), _PairSum())
                    pair_sum.add(parts[first], parts[second], blocks.get(first), blocks.get(second))
        if len(blocks) > 1 and len({block.shape for block in blocks.values()}) == 1:
            whole.add([*blocks.values()])
        W2 = self._stored(self.after, place, expert)
        if W is not None and W2 is not None and W.shape == W2.shape:
            changes = [(self.factors[at], delta) for at, delta in enumerate(row) if delta is not None]
            after.add(W, W2, changes, self._dtype_after(place.target))

    def _dtype_after(self, target: Target) -> DType:
        """Return the dtype of a target's weight in the merged model."""
        assert self.after is not None
        name = self.after.sites[target].weight
        assert name is not None
        return self.after.base.tensors[name].dtype

    @staticmethod
    def _stored(weights: Weights | None, place: AlignedPlace, expert: int) -> Array | None:
        if weights is None or expert >= EXPERTS or place.target not in weights.sites:
            return None
        if weights.sites[place.target].weight is None:
            return None
        return weights.at(place.target, expert if place.target.stacked else None, bias=False)


def _weights(aligned: Sequence[AlignedPlace], base: Checkpoint) -> Weights:
    from ..ops.lowering import Weights

    return Weights({place.target: next(filter(None, place.updates)) for place in aligned if place.target.path}, base)


def _unmeasured(adapter: int, target: str, updates: Sequence[Update], error: AdapterkitError) -> Effect:
    return Effect(adapter, target, _methods(updates), why=error.why, code=error.code)


def _methods(updates: Sequence[Update]) -> str:
    return " + ".join(dict.fromkeys(update.method for update in updates))


@dataclass(frozen=True, slots=True, eq=False)
class _MeasuredPart:
    """An adapter's change of a weight, as an SVD: U `[out, r]`, S `[r]`, V `[in * k, r]`; U and V are orthonormal.

    A change without low-rank factors is also stored in `dense`. U, S and V are None if such a change is too large for
    an SVD.
    """

    delta: Delta
    U: Array | None
    S: Array | None
    V: Array | None
    dense: Array | None

    @classmethod
    def of(cls, delta: Delta) -> _MeasuredPart:
        import numpy as np

        if delta.rest is None:
            cores = core([delta])
            u, S, vh = np.linalg.svd(cores.cores[0], full_matrices=False)
            count = int((S[:1] * 1e-12 < S).sum())
            return cls(delta, cores.left @ u[:, :count], S[:count], (vh[:count] @ cores.right).T, None)
        dense = delta.dense()
        if min(dense.shape) > LARGEST_EXACT:
            return cls(delta, None, None, None, dense)
        U, S, Vh = exact(dense)
        count = int((S[:1] * 1e-12 < S).sum())
        return cls(delta, U[:, :count], S[:count], Vh[:count].T, dense)

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    @property
    def square(self) -> float:
        """The squared norm."""
        values = self.S if self.dense is None else self.dense
        assert values is not None
        return float((values * values).sum())

    def block(self) -> Array:
        """The measured block: the elements at up to `SIDE` evenly spread rows and columns of the change."""
        rows, columns = (spread(size) for size in self.shape)
        B, A, rest = self.delta.B[rows], self.delta.A[:, columns], self.delta.rest
        product: Array = B @ A
        return product if rest is None else product + rest[rows][:, columns]


def spread(size: int) -> Array:
    """Return at most `SIDE` indices that are evenly spread over an axis of length `size`."""
    import numpy as np

    return np.unique(np.linspace(0, size - 1, min(size, SIDE)).round().astype(int))


class _Sum:
    """Accumulate the measurements of one adapter at one target. For stacked experts, call `add` once per expert."""

    def __init__(self) -> None:
        self.square, self.largest = 0.0, -1.0
        # These sums of squares include only the experts whose weight is read from the base.
        self.compared, self.base = 0.0, 0.0
        self.based = False
        self.spectrum: tuple[float, ...] = ()
        self.ranks: list[float] = []
        self.rank: int | None = None
        self.rank_99: int | None = None
        self.blocks: list[Array] = []

    def add(self, part: _MeasuredPart, block: Array | None, base: float | None) -> None:
        square = part.square
        self.square += square
        if base is not None:
            self.compared, self.base, self.based = self.compared + square, self.base + base, True
        if block is not None:
            self.blocks.append(block.ravel())
        if part.delta.rest is None:
            self.rank = max(self.rank or 0, part.delta.rank)
        if part.S is None:
            return
        self.ranks.append(effective_rank(part.S))
        self.rank_99 = max(self.rank_99 or 0, rank_of(part.S, 0.99))
        if square > self.largest:
            self.largest, self.spectrum = square, tuple(map(float, part.S[:SHOWN]))

    def effect(
        self, adapter: int, target: str, updates: Sequence[Update], shape: tuple[int, ...], bias: float | None
    ) -> Effect:  # fmt: skip
        quantiles, peak = _values(self.blocks)
        scalings = {update.attributes.get("scaling") for update in updates}
        scaling = scalings.pop() if len(scalings) == 1 else None
        norm = math.sqrt(self.square)
        return Effect(
            adapter, target, _methods(updates), shape, self.rank, scaling, norm, bias, self.spectrum,
            math.fsum(self.ranks) / len(self.ranks) if self.ranks else None, self.rank_99, quantiles, peak,
            math.sqrt(self.compared / self.base) if self.based and self.base else None,
        )  # fmt: skip


def rank_of(S: Array, share: float) -> int:
    """Return how many of the largest singular values are needed for at least this share of the squared norm."""
    import numpy as np

    if not len(S):
        return 0
    energy = np.cumsum(S * S)
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1


def _values(blocks: Sequence[Array]) -> tuple[tuple[float, ...], float | None]:
    import numpy as np

    if not blocks:
        return (), None
    values = np.concatenate(blocks)
    size = math.sqrt(float((values * values).mean()))
    quantiles = tuple(map(float, np.quantile(values, QUANTILES)))
    return quantiles, float(np.abs(values).max()) / size if size else None


class _PairSum:
    """Accumulate the comparison of two adapters at one target. For stacked experts, call `add` once per expert."""

    def __init__(self) -> None:
        self.product, self.first, self.second = 0.0, 0.0, 0.0
        self.overlaps: tuple[list[float], list[float]] = ([], [])
        self.both, self.against = 0, 0
        self.lost = _Lost()

    def add(self, one: _MeasuredPart, other: _MeasuredPart, block: Array | None, against: Array | None) -> None:
        import numpy as np

        self.first, self.second = self.first + one.square, self.second + other.square
        if one.dense is None and other.dense is None:
            assert one.U is not None
            assert one.S is not None
            assert one.V is not None
            assert other.U is not None
            assert other.S is not None
            assert other.V is not None
            left, right = one.U.T @ other.U, one.V.T @ other.V
            self.product += float(one.S @ (left * right) @ other.S)
        else:
            self.product += float((_dense(one) * _dense(other)).sum())
            left, right = None, None
            if one.U is not None and other.U is not None and one.V is not None and other.V is not None:
                left, right = one.U.T @ other.U, one.V.T @ other.V
        for overlaps_of_side, product in zip(self.overlaps, (left, right), strict=True):
            if product is not None and min(product.shape):
                overlaps_of_side.append(float((product * product).sum()) / min(product.shape))
        if block is not None and against is not None:
            product = block * against
            self.both += int(np.count_nonzero(product))
            self.against += int((product < 0).sum())
            self.lost.add([block, against])

    def relation(self, first: int, second: int, target: str) -> Relation:
        size = math.sqrt(self.first * self.second)
        cosine = max(-1.0, min(1.0, self.product / size)) if size else None
        out, into = (
            math.fsum(overlaps_of_side) / len(overlaps_of_side) if overlaps_of_side else None
            for overlaps_of_side in self.overlaps
        )
        return Relation(
            first, second, target, self.product, cosine, out, into, self.against / self.both if self.both else None,
            self.lost.share if self.lost.moved else None,
        )  # fmt: skip


def _dense(part: _MeasuredPart) -> Array:
    return part.delta.dense() if part.dense is None else part.dense


class _Lost:
    """Accumulate the interference of changes; see `Relation.interference`."""

    def __init__(self) -> None:
        self.moved, self.left = 0.0, 0.0

    def add(self, blocks: Sequence[Array]) -> None:
        import numpy as np

        self.moved += sum(float(np.abs(block).sum()) for block in blocks)
        self.left += float(np.abs(sum(blocks)).sum())

    @property
    def share(self) -> float:
        return 1 - self.left / self.moved


class _MergedSum:
    """Compare one target's weight in the merged model with the base's weight plus the adapters' changes.

    For stacked experts, call `add` once per expert.
    """

    def __init__(self) -> None:
        self.change, self.along, self.error, self.rounded, self.dtype = 0.0, 0.0, 0.0, 0.0, ""

    def add(self, W: Array, merged: Array, changes: Sequence[tuple[float, Delta]], dtype: DType) -> None:
        asked: Any = sum(weight * delta.dense() for weight, delta in changes)
        there, self.dtype = merged - W, dtype.name
        self.change += float((asked * asked).sum())
        self.along += float((asked * there).sum())
        self.error += float(((there - asked) ** 2).sum())
        # Compute how much of the change a perfect merge would keep. A perfect merge rounds each sum once, so even a
        # perfect merge loses small changes of large weights.
        narrow = (W + asked).astype(dtype.array).astype(W.dtype) - W if dtype.itemsize <= 2 else asked
        self.rounded += float((asked * narrow).sum())

    def merged(self, target: str) -> MergedShare:
        kept, rounded = self.along / self.change, self.rounded / self.change
        return MergedShare(target, kept, math.sqrt(self.error / self.change), rounded, self.dtype)


def _to_decompose(effects: Sequence[Effect], aligned: Sequence[AlignedPlace]) -> list[tuple[Effect, int]]:
    """Return the effects to check for intruders, each with its cost in units of `INTRUDER_UNIT`.

    The effects are chosen in descending order of `Effect.relative`. An effect is skipped if its cost would exceed what
    is left of `INTRUDER_BUDGET`, if its target is a stack of experts, or if its `relative` is None or 0.
    """
    stacked = {str(place.target) for place in aligned if place.target.stacked}
    chosen, budget = list[tuple[Effect, int]](), INTRUDER_BUDGET
    for effect in sorted(effects, key=lambda each: -(each.relative or 0.0)):
        if not effect.relative or effect.shape is None or effect.target in stacked:
            continue
        out, columns = effect.shape[0], math.prod(effect.shape[1:])
        cost = 2.0 * min(out, columns) ** 2 * max(out, columns)
        if cost <= budget:
            budget -= cost
            chosen.append((effect, max(1, round(cost / INTRUDER_UNIT))))
    return chosen


def _intruders(
    chosen: Sequence[tuple[Effect, int]], aligned: Sequence[AlignedPlace], base: Weights
) -> Iterator[int]:  # fmt: skip
    """Yield the number of intruders for each chosen effect."""
    by_name = {str(place.target): place for place in aligned}
    directions: dict[str, Array] = {}
    for effect, _ in chosen:
        place = by_name[effect.target]
        W = base.at(place.target, None, bias=False)
        if effect.target not in directions:
            directions[effect.target] = _left(W, min(W.shape[0], W.size // W.shape[0]))
        (change,) = lowered(AlignedPlace(place.target, (place.updates[effect.adapter],), place.base)).changes()
        assert change is not None
        tuned = W + next(change.deltas()).dense()
        cosines = abs(directions[effect.target].T @ _left(tuned, INTRUDING))
        yield int((cosines.max(0) < INTRUDER_COSINE).sum())


def _left(W: Array, count: int) -> Array:
    """Return the first `count` left singular vectors of a weight.

    The vectors are computed from the smaller Gram matrix, which takes 1/6 of the time of a full SVD.
    """
    import numpy as np

    D = W.reshape(len(W), -1).astype(np.float64, copy=False)
    if D.shape[0] <= D.shape[1]:
        vectors: Array = np.linalg.eigh(D @ D.T)[1][:, ::-1][:, :count]
        return vectors
    U = D @ np.linalg.eigh(D.T @ D)[1][:, ::-1][:, :count]
    directions: Array = U / np.maximum(np.sqrt((U * U).sum(0)), np.finfo(float).tiny)
    return directions
