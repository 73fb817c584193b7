"""The arithmetic of a merge: one block of one stored tensor, float64 in the middle, rounded at the end.

Every adapter is read against the base it was trained on: W' = W + sum_i weight_i * (f_i(W) - W), whatever their order.
float64 keeps each element of a 16-bit output within 0.501 units in the last place of the exact result, also where W and
the change nearly cancel, which float32 does not; the casts to bf16 and fp8 go by way of float32, hence not 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError, Malformed
from ..tensors.lazy import Lazy
from ..updates import Additive, Update
from .planning import BLOCK_ELEMENTS, Output
from .rounding import key_of, stochastic

if TYPE_CHECKING:
    from ..tensors.lazy import Leaf
    from .arrays import Arrays, Workspace
    from .folds import Fold

THIN = 256
"""Ranks up to which factors are put side by side with those of other adapters."""


@dataclass(frozen=True, slots=True)
class Block:
    """Stored rows `start` to `stop` of a tensor of `rows`, or of one expert's slice of it; offsets count elements."""

    expert: int | None
    start: int
    stop: int
    rows: int
    width: int

    @property
    def first(self) -> int:
        return ((self.expert or 0) * self.rows + self.start) * self.width

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * self.width

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.rows


def blocks(output: Output) -> list[Block]:
    """The blocks of an output tensor in file order; their cut depends on the tensor alone."""
    shape = output.shape or (1,)
    stacked = any(fold.target.stacked for fold in output.folds)
    experts = range(shape[0]) if stacked else (None,)
    rows, *rest = shape[1:] if stacked else shape
    width = math.prod(rest)
    cut = all(fold.blockable for fold in output.folds)
    step = max(1, BLOCK_ELEMENTS // max(width, 1)) if cut else max(rows, 1)
    return [
        Block(expert, start, min(start + step, rows), rows, width)
        for expert in experts
        for start in range(0, rows, step)
        if width
    ]


class Folder:
    """Folds ready to be applied to the blocks of one output tensor: their factors loaded once, in float64.

    Raises:
        Malformed: a factor holds a NaN or an infinity.
    """

    def __init__(self, output: Output, workspace: Workspace) -> None:
        self.output, self.workspace, self.arrays = output, workspace, workspace.arrays
        self.folds = [(fold, _load_all(fold, self.arrays)) for fold in output.folds]

    @cached_property
    def watched(self) -> bool:
        """Whether a result could be NaN or infinite although base and factors are finite."""
        return (self.output.dtype.itemsize < 4 and self.output.dtype.name != "BF16") or any(
            not fold.additive for fold, _ in self.folds
        )

    def norms(self) -> dict[int, float]:
        """Squared norms of the changes that need no look at the base, by fold."""
        return {
            position: (fold.weight * _norm(updates, fold)) ** 2
            for position, (fold, updates) in enumerate(self.folds)
            if fold.additive and not fold.bias
        }

    def compute(self, raw: Any, out: Any, block: Block) -> dict[int, float]:
        """Computes one block from the base's values `raw` into `out`, both flat; returns squared norms by fold.

        Raises:
            Malformed: the result does not fit the output's dtype, or is NaN.
        """
        if not self.folds and self._key is None:
            self.arrays.assign(out, raw)
            return {}
        if self._key is not None:
            work = self._image(raw, block)
            norms = self._fold(work, block)
            self.arrays.assign(out, stochastic(work.reshape(-1), block.first, self._key, self.output.dtype))
        elif self._sums:
            norms = {}
            self.arrays.add(raw, self._sum(block), out)
        else:
            work = self._image(raw, block)
            norms = self._fold(work, block)
            self.arrays.assign(out, work.reshape(-1))
        if self.watched and not self.arrays.finite(out) and self.arrays.finite(raw):
            raise Malformed(
                f"merging gives values that {self.output.dtype} cannot hold", where=self.output.name,
                cure="Merge with a smaller weight, or write a wider dtype with dtype=/--dtype",
            )  # fmt: skip
        return norms

    def exact(self, raw: Any, block: Block) -> Any:
        """The float64 result that `compute` rounds; flat."""
        work = self._image(raw, block)
        self._fold(work, block)
        return work.reshape(-1)

    @cached_property
    def _key(self) -> tuple[int, int] | None:
        """Of stochastic rounding, where that was chosen and the output is narrower than float64."""
        seed, kind = self.output.seed, self.output.dtype
        rounds = seed is not None and kind.floating and kind.name != "F64" and not kind.torch.startswith("complex")
        return key_of(seed, self.output.name) if rounds and seed is not None else None

    @cached_property
    def _sums(self) -> bool:
        """Whether the folds add up over whole blocks, whatever the base's values."""
        return all(fold.additive and not fold.bias and fold.target.rows is None for fold, _ in self.folds)

    def _sum(self, block: Block) -> Any:
        """What all folds add to the block, in float64; flat."""
        total = self._shaped(self.workspace.take(block.elements), block)
        for position, (fold, updates, weight) in enumerate(self._terms):
            view = _view(total, fold, (block.start, block.stop), block)
            cut = _additive(_cut(update, fold, block, (block.start, block.stop)) for update in updates)
            if position == 0:
                cut.pop(0).delta_into(view, weight)
            _add(cut, view, weight)
        return total.reshape(-1)

    @cached_property
    def _terms(self) -> list[tuple[Fold, list[Update], float]]:
        """What adds up, with weights; thin factors of several adapters side by side: one product is much faster."""
        terms = [(fold, updates, fold.weight) for fold, updates in self.folds]
        if len(terms) < 2:
            return terms
        thin = [term for term in terms if _is_thin(term[0], term[1]) and term[0].axis == terms[0][0].axis]
        if len(thin) < 2:
            return terms
        one = _side_by_side(thin, self.arrays)
        return [(thin[0][0], [one], 1.0), *(term for term in terms if term not in thin)]

    def _image(self, raw: Any, block: Block) -> Any:
        """The block in float64, as `[rows, *rest]`, in memory that is used again for the next one."""
        work = self.workspace.take(block.elements)
        self.arrays.assign(work, raw)
        return self._shaped(work, block)

    def _shaped(self, flat: Any, block: Block) -> Any:
        rest = self.output.shape[1 + (block.expert is not None) :]
        return flat.reshape(block.stop - block.start, *rest)

    def _fold(self, work: Any, block: Block) -> dict[int, float]:
        norms: dict[int, float] = {}
        original = work * 1 if self._needs_original else work
        untouched = True
        for position in self._order:
            fold, updates = self.folds[position]
            part = _part(fold, block)
            if part is None:
                continue
            view, W = (_view(t, fold, part, block) for t in (work, original))
            cut = [_cut(update, fold, block, part) for update in updates]
            if fold.additive and not fold.bias:
                _add(_additive(cut), view, fold.weight)
            else:
                norms[position] = _mix(_through(cut, W, fold.bias), W, view, fold.weight, replace=untouched)
            untouched = False
        return norms

    @cached_property
    def _order(self) -> list[int]:
        """What is not a plain sum comes first: with weight 1 it is then taken as it is, without a difference."""
        return sorted(range(len(self.folds)), key=lambda position: self.folds[position][0].additive)

    @cached_property
    def _needs_original(self) -> bool:
        return sum(not fold.additive or fold.bias for fold, _ in self.folds) > 1


def _is_thin(fold: Fold, updates: Sequence[Update]) -> bool:
    """Whether all is a product of factors of so few ranks that the product is how it is best computed."""
    if len(fold.shape) != 2 or fold.target.stacked:
        return False
    pairs = [update.pair(_logical(fold)) for update in updates if isinstance(update, Additive)]
    return len(pairs) == len(updates) and all(pair is not None and pair[1].shape[0] <= THIN for pair in pairs)


def _side_by_side(terms: Sequence[tuple[Fold, list[Update], float]], arrays: Arrays) -> Update:
    """sum of weight * B @ A over all updates as one LoRA of all their ranks."""
    from ..methods.lora import LoRA

    pairs = [(w, u.pair(_logical(fold))) for fold, us, w in terms for u in _additive(us)]
    factors = [(w, *pair) for w, pair in pairs if pair is not None]
    A, B = arrays.joined([A for _, _, A in factors], 0), arrays.joined([w * B for w, B, _ in factors], 1)
    return LoRA(A=A, B=B, bias=None, scaling=1.0)


def _additive(updates: Iterable[Update]) -> list[Additive]:
    return [update for update in updates if isinstance(update, Additive)]


def _add(updates: Sequence[Additive], view: Any, weight: float) -> None:
    for update in updates:
        view += weight * update.delta(tuple(view.shape))


def _mix(new: Any, W: Any, view: Any, weight: float, *, replace: bool) -> float:
    """Moves `view` by `weight` of the way from W to `new`; returns the squared norm of the move."""
    change = new - W
    norm = weight**2 * float((change * change).sum())
    if replace and weight == 1:
        view[...] = new
    else:
        view += weight * change
    return norm


def _through(updates: list[Update], W: Any, bias: bool) -> Any:
    for update in updates:
        W = update.new_bias(W) if bias else update.new_weight(W)
    return W


def _load_all(fold: Fold, arrays: Arrays) -> list[Update]:
    updates = [_load(update, fold, arrays) for update in fold.updates]
    if fold.seen is None:
        return updates
    W = _whole_view(arrays.load(fold.seen), fold)
    return [update.settled(W) for update in updates]


def _whole_view(W: Any, fold: Fold) -> Any:
    """A stored weight as the updates see it; of stacked experts, all of them."""
    axis = int(fold.target.stacked)
    W = W if fold.axis == "out" else W.swapaxes(axis, axis + 1)
    return W if fold.target.rows is None else W[(slice(None),) * axis + (slice(*fold.target.rows),)]


def _load(update: Update, fold: Fold, arrays: Arrays) -> Update:
    read = update.map(_read)
    try:
        read.check_values()
    except AdapterkitError as error:
        error.where = f"{fold.target}: {update.method}" + (f".{error.where}" if error.where else "")
        raise
    return read.map(arrays.load)


def _read(leaf: Leaf) -> Leaf:
    """A leaf whose bytes are in memory: they are checked and then loaded, and read from disk once."""
    if not isinstance(leaf, Lazy):
        return leaf
    data = leaf.fetch()
    return Lazy(leaf.shape, leaf.dtype, lambda: data)


def _norm(updates: list[Update], fold: Fold) -> float:
    shape = _logical(fold)
    experts = range(fold.shape[0]) if fold.target.stacked else (None,)
    squares = 0.0
    for expert in experts:
        parts = [u if expert is None else u.expert(expert) for u in updates]
        if len(parts) == 1 and isinstance(parts[0], Additive):
            squares += parts[0].delta_norm(shape) ** 2
        else:
            total: Any = sum(part.delta(shape) for part in parts if isinstance(part, Additive))
            squares += float((total * total).sum())
    return math.sqrt(squares)


def _logical(fold: Fold) -> tuple[int, ...]:
    """The shape of one weight as the updates see it."""
    first, second, *rest = fold.shape[1:] if fold.target.stacked else (*fold.shape, 1)[: max(2, len(fold.shape))]
    shape = (second, first, *rest) if fold.axis == "in" else (first, second, *rest)
    return shape if fold.target.rows is None else (fold.target.rows[1] - fold.target.rows[0], *shape[1:])


def _part(fold: Fold, block: Block) -> tuple[int, int] | None:
    """The stored rows of the block that the fold touches; None where it touches none."""
    if fold.target.rows is None or fold.axis == "in":
        return block.start, block.stop
    start, stop = max(block.start, fold.target.rows[0]), min(block.stop, fold.target.rows[1])
    return (start, stop) if start < stop else None


def _view(work: Any, fold: Fold, part: tuple[int, int], block: Block) -> Any:
    """The touched part of a block as the updates see it: `[out, in, *k]`."""
    if fold.bias:
        return work if fold.target.rows is None else work[slice(*fold.target.rows)]
    work = work[part[0] - block.start : part[1] - block.start]
    if fold.axis == "out":
        return work
    view = work.swapaxes(0, 1)
    return view if fold.target.rows is None else view[fold.target.rows[0] : fold.target.rows[1]]


def _cut(update: Update, fold: Fold, block: Block, part: tuple[int, int]) -> Update:
    """The update for the touched part of a block."""
    if block.expert is not None:
        update = update.expert(block.expert)
    if block.whole or fold.bias:
        return update
    offset = fold.target.rows[0] if fold.target.rows is not None and fold.axis == "out" else 0
    return update.block(fold.axis, part[0] - offset, part[1] - offset)


def runs(blocks_: list[Block], nbytes: int, itemsize: int) -> Iterator[list[Block]]:
    """Consecutive blocks in runs of about `nbytes`: what one worker takes at a time."""
    run: list[Block] = []
    for block in blocks_:
        run.append(block)
        if sum(b.elements for b in run) * itemsize >= nbytes:
            yield run
            run = []
    if run:
        yield run
