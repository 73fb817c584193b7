"""The arithmetic of a merge: one block of one stored tensor, float64 in the middle, rounded at the end.

Every adapter is read against the base it was trained on: W' = W + sum_i weight_i * (f_i(W) - W), whatever their order.
float64 keeps each element of a 16-bit output within 0.501 units in the last place of the exact result, also where W and
the change nearly cancel, which float32 does not; the casts to bf16 and fp8 go by way of float32, hence not 0.5.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..core.updates import Additive, Update
from ..errors import Malformed
from .blocks import Block, cut_to, part_of, view_of
from .factors import Term, additive, is_thin, load_all, norm_of, side_by_side
from .planned import Output
from .rounding import key_of, stochastic

if TYPE_CHECKING:
    from .arrays import Workspace
    from .fold import Fold

LARGE = 1e30
"""Norm of a change from which on results are checked, also where the output has float32's range."""


class Folder:
    """Folds ready to be applied to the blocks of one output tensor: their factors loaded once, in float64.

    Raises:
        Malformed: a factor holds a NaN or an infinity.
    """

    def __init__(self, output: Output, workspace: Workspace) -> None:
        self.output, self.workspace, self.arrays = output, workspace, workspace.arrays
        self.folds = [(fold, load_all(fold, self.arrays)) for fold in output.folds]

    @cached_property
    def watched(self) -> bool:
        """Whether a result could be NaN or infinite although base and factors are finite."""
        narrow = self.output.dtype.itemsize < 4 and self.output.dtype.name != "BF16"
        return narrow or any(not fold.additive or not self._is_small(fold, us) for fold, us in self.folds)

    def _is_small(self, fold: Fold, updates: list[Update]) -> bool:
        """Whether a sum is far from the largest float32, as far as that is cheap to tell.

        The norm of a product of thin factors bounds each of its elements; an alpha of 1e308 is a finite number, too.
        """
        thin = not fold.bias and is_thin(fold, updates)
        return thin and abs(fold.weight) * norm_of(updates, fold) < LARGE

    def norms(self) -> dict[int, float]:
        """Squared norms of the changes that need no look at the base, by fold."""
        # `**` raises where the square is no float any more; the product is infinite, and a report needs a number.
        largest = sys.float_info.max
        return {
            position: min((size := fold.weight * norm_of(updates, fold)) * size, largest)
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
        given, finite = self.output.source.dtype, self.arrays.finite
        if self.watched and not finite(out, self.output.dtype) and finite(raw, given):
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
        return all(
            fold.additive and not fold.bias and fold.target.rows is None and fold.shape[:1] == self.output.shape[:1]
            for fold, _ in self.folds
        )

    def _sum(self, block: Block) -> Any:
        """What all folds add to the block, in float64; flat."""
        total = self._shaped(self.workspace.take(block.elements), block)
        for position, (fold, updates, weight) in enumerate(self._terms):
            view = view_of(total, fold, (block.start, block.stop), block)
            cut = additive(cut_to(update, fold, block, (block.start, block.stop)) for update in updates)
            if position == 0:
                cut.pop(0).delta_into(view, weight)
            _add(cut, view, weight)
        return total.reshape(-1)

    @cached_property
    def _terms(self) -> list[Term]:
        """What adds up, with weights; thin factors of several adapters side by side: one product is much faster."""
        terms = [(fold, updates, fold.weight) for fold, updates in self.folds]
        if len(terms) < 2:
            return terms
        thin = [term for term in terms if is_thin(term[0], term[1]) and term[0].axis == terms[0][0].axis]
        if len(thin) < 2:
            return terms
        one = side_by_side(thin, self.workspace)
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
            part = part_of(fold, block)
            if part is None:
                continue
            view, W = (view_of(t, fold, part, block) for t in (work, original))
            cut = [cut_to(update, fold, block, part) for update in updates]
            if fold.additive and not fold.bias:
                _add(additive(cut), view, fold.weight)
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


def _add(updates: Sequence[Additive], view: Any, weight: float) -> None:
    for update in updates:
        view += weight * update.delta(tuple(view.shape))


def _mix(new: Any, W: Any, view: Any, weight: float, *, replace: bool) -> float:
    """Moves `view` by `weight` of the way from W to `new`; returns the squared norm of the move."""
    change = new - W
    flat = change.reshape(-1)
    norm = weight**2 * float(flat @ flat)
    if replace and weight == 1:
        view[...] = new
    else:
        view += weight * change
    return norm


def _through(updates: list[Update], W: Any, bias: bool) -> Any:
    for update in updates:
        W = update.new_bias(W) if bias else update.new_weight(W)
    return W
