"""Cut stored tensors into blocks of rows, and cut updates to the rows of a block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..linalg.products import ROWS
from .planned import BLOCK_ELEMENTS, Output

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..linalg.namespace import Numbers
    from .planned_update import PlannedUpdate


@dataclass(frozen=True, slots=True)
class Block:
    """The rows `start` to `stop - 1` of a stored tensor, or of the tensor's slice for one expert.

    `expert` is the index of the expert; None if the block belongs to the whole tensor. The tensor or slice has `rows`
    rows with `width` elements each. `first` is the index of the block's first element in the flattened tensor, and
    `elements` is the number of the block's elements.
    """

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
    """Return the blocks of an output tensor in file order. The blocks depend only on the tensor and its updates."""
    shape = output.shape or (1,)
    stacked = any(fold.target.stacked for fold in output.folds)
    experts = range(shape[0]) if stacked else (None,)
    rows, width = shape[int(stacked)], math.prod(shape[int(stacked) + 1 :])
    # Some updates, such as rotations of the outputs, need all rows of the weight. With such an update, a block has all
    # rows of the tensor or of an expert's slice.
    step = max(rows, 1)
    if all(fold.blockable for fold in output.folds):
        # Round the number of rows down to a multiple of `ROWS`, because one call of OpenBLAS computes `ROWS` rows. If
        # fewer than `ROWS` rows fit into a block, do not round.
        step = BLOCK_ELEMENTS // max(width, 1)
        step = max(1, step - step % ROWS if step > ROWS else step)
    return [
        Block(expert, start, min(start + step, rows), rows, width)
        for expert in experts
        for start in range(0, rows, step)
        if width
    ]


def runs(blocks_: list[Block], nbytes: int, itemsize: int) -> Iterator[list[Block]]:
    """Group consecutive blocks into runs of at least `nbytes` bytes; only the last run may be smaller.

    A worker computes one run at a time.
    """
    run: list[Block] = []
    elements = 0
    for block in blocks_:
        run.append(block)
        elements += block.elements
        if elements * itemsize >= nbytes:
            yield run
            run, elements = [], 0
    if run:
        yield run


def part_of(fold: PlannedUpdate, block: Block) -> tuple[int, int] | None:
    """Return the range of rows that a planned update changes in a block, as (first row, last row + 1).

    Return None if the update changes no row of the block. Rows are counted as in `Block`: from the start of the tensor,
    or of the tensor's slice for one expert.
    """
    if fold.target.rows is None or fold.axis == "in":
        # If the base has more rows than the adapter was trained with, the adapter changes only the first rows.
        last = block.stop if fold.target.stacked else min(block.stop, fold.shape[0] if fold.shape else block.stop)
        return (block.start, last) if block.start < last else None
    start, stop = max(block.start, fold.target.rows[0]), min(block.stop, fold.target.rows[1])
    return (start, stop) if start < stop else None


def view_of(work: Numbers, fold: PlannedUpdate, part: tuple[int, int], block: Block) -> Numbers:
    """Return a view of the changed part of a block, with the axes in the order that updates use: `[out, in, *k]`."""
    if fold.bias:
        return work[: part[1]] if fold.target.rows is None else work[slice(*fold.target.rows)]
    work = work[part[0] - block.start : part[1] - block.start]
    if fold.axis == "out":
        return work
    view = work.swapaxes(0, 1)
    return view if fold.target.rows is None else view[fold.target.rows[0] : fold.target.rows[1]]


def cut_to(update: Update, fold: PlannedUpdate, block: Block, part: tuple[int, int]) -> Update:
    """Return the part of an update that changes the range of rows `part`, as returned by `part_of` for `block`."""
    if block.expert is not None:
        update = update.expert(block.expert)
    if block.whole or fold.bias:
        return update
    offset = fold.target.rows[0] if fold.target.rows is not None and fold.axis == "out" else 0
    return update.block(fold.axis, part[0] - offset, part[1] - offset)
