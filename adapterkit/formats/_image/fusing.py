"""Split updates of fused weights into updates of the parts, and join updates of parts.

Values are computed only if scalings differ. Otherwise rows are copied, and rows without an update are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

from ...core.updates import Update
from ...io.arrange import times
from ...io.lazy import DTYPES, Lazy, as_array, as_lazy
from ...methods.dense import Dense
from ...methods.dora import DoRA
from ...methods.lokr import LoKr
from ...methods.lora import LoRA
from ...methods.oft import OFT
from ...naming.pieces import Run
from .hints import fingerprint

if TYPE_CHECKING:
    from ...io.lazy import Leaf


def parted(update: Update, spans: Sequence[tuple[int, int]]) -> list[Update] | None:
    """Split an update by spans of rows; None if the update's formula cannot be split along outputs.

    If a LoRA was joined from LoRAs of the spans, each span has its own ranks, and its part gets only these ranks. For
    any other LoRA, all parts have the whole A.
    """
    if isinstance(update, LoRA) and (ranks := _diagonal(update, spans)):
        whole = [
            update.replace(A=narrow(update.A, 0, *rank), B=narrow(narrow(update.B, 0, *span), 1, *rank))
            for span, rank in zip(spans, ranks, strict=True)
        ]
        return [_bias_cut(part, span) for part, span in zip(whole, spans, strict=True)]
    if isinstance(update, LoKr):
        return _kronecker_parts(update, spans)
    if isinstance(update, OFT) and update.side == "out":
        return _rotation_parts(update, spans)
    if not update.cuts("out"):
        return None
    return [_rows(update, span) for span in spans]


def _rotation_parts(update: OFT, spans: Sequence[tuple[int, int]]) -> list[Update] | None:
    """Split an OFT by spans; None if a block crosses the end of a span, or if a constraint couples the blocks."""
    name = "square" if update.square is not None else "pairs"
    size = int(update.dims()["b"]) if update.square is not None else 0  # type: ignore[arg-type]
    if not size or update.constraint or update.coft or any(edge % size for span in spans for edge in span):
        return None
    parts: list[Update] = []
    for start, stop in spans:
        part = update.replace(**{name: narrow(update.tensors[name], 0, start // size, stop // size)})
        parts.append(part if part.rescale is None else part.replace(rescale=narrow(part.rescale, 0, start, stop)))
    return parts


def _kronecker_parts(update: LoKr, spans: Sequence[tuple[int, int]]) -> list[Update] | None:
    """Split a LoKr by spans; None if a span ends inside a block of rows that belongs to one row of w1."""
    size = int(update.dims()["out"]) // int(update.dims()["a"])  # type: ignore[arg-type]
    if update.stacked or any(edge % size for span in spans for edge in span):
        return None
    name = "w1" if update.w1 is not None else "w1_a"
    return [
        update.replace(**{name: narrow(update.tensors[name], 0, start // size, stop // size)}) for start, stop in spans
    ]


def _rows(update: Update, span: tuple[int, int]) -> Update:
    changes = {}
    for name, leaf in update.tensors.items():
        axis = update.tensor_fields()[name].metadata["axes"].index("out")
        if axis is not None:
            changes[name] = narrow(leaf, axis, *span)
    return update.replace(**changes)


def _bias_cut(update: LoRA, span: tuple[int, int]) -> LoRA:
    return update if update.bias is None else update.replace(bias=narrow(update.bias, 0, *span))


def _diagonal(update: LoRA, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return each span's range of ranks if B is block-diagonal and no block is zero; otherwise an empty list."""
    used = as_array(as_lazy(update.B)) != 0
    edges = [0]
    for start, stop in spans:
        columns = used[start:stop].any(0).nonzero()[0]
        if not len(columns) or columns[0] < edges[-1]:
            return []
        edges.append(int(columns[-1]) + 1)
    edges[-1] = used.shape[1]
    return list(pairwise(edges)) if len(spans) > 1 else []


def outputs_of(update: Update) -> int | None:
    """Return the number of outputs of an update's weight; None if the update's tensors do not show this number."""
    dims = update.dims()
    if isinstance(update, OFT) and update.side == "out" and update.square is not None:
        return int(dims["n"]) * int(dims["b"])  # type: ignore[arg-type]
    return cast("int | None", dims.get("out"))


def narrow(leaf: Leaf, axis: int, start: int, stop: int) -> Lazy:
    """Return the slice `start:stop` of an axis."""
    tensor = as_lazy(leaf)
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    return tensor.map(lambda array: array[(*[slice(None)] * axis, slice(start, stop))], shape)


@dataclass(frozen=True, slots=True, eq=False)
class FusedPart:
    """An update of a run of consecutive rows of a fused weight."""

    run: Run
    update: Update

    @property
    def unit(self) -> int:
        """Return the number of rows in each of the weight's equal parts; 0 if the rows cannot be divided equally."""
        out = outputs_of(self.update) or 0
        return out // self.run.parts if out % self.run.parts == 0 else 0


def joined(parts: Sequence[FusedPart], *, fold: bool) -> tuple[Update | None, str]:
    """Join updates of row blocks into one update of the fused weight, or return the reason why they cannot be joined.

    Args:
        parts: the updates, one for each row block.
        fold: whether different scalings may be folded into B, with rounding.
    """
    unit, of = parts[0].unit, parts[0].run.of
    if not unit and outputs_of(parts[0].update) is None and sum(part.run.parts for part in parts) == of:
        whole = _stacked([part.update for part in parts])
        return (
            whole,
            "" if whole is not None else f"{parts[0].update.method} differs between the parts of a fused weight",
        )
    if not unit or any(part.unit != unit for part in parts):
        return None, "the sizes of its parts do not add up to the fused weight"
    parts = sorted(parts, key=lambda part: part.run.start)
    rows = [(part.run.start * unit, part.run.stop * unit) for part in parts]
    updates: list[Any] = [part.update for part in parts]
    if all(isinstance(update, Dense) and update.scaling == 1 for update in updates):
        return _dense(updates, rows, unit * of), ""
    shared = _shared(updates)
    if all(isinstance(update, DoRA) for update in updates):
        if not shared or sum(part.run.parts for part in parts) != of:
            return None, "dora does not have the same A on all parts of a fused weight"
        lengths = place([(row, None, u.magnitude) for row, u in zip(rows, updates, strict=True)], (unit * of,))
        return updates[0].replace(B=_under(updates, rows, unit * of), magnitude=lengths), ""
    if shared and all(isinstance(update, LoRA) and update.bias is not None for update in updates):
        if sum(part.run.parts for part in parts) != of:
            return None, "lora has a bias on only some parts of a fused weight"
        bias = place([(row, None, u.bias) for row, u in zip(rows, updates, strict=True)], (unit * of,))
        return updates[0].replace(B=_under(updates, rows, unit * of), bias=bias), ""
    if not all(isinstance(update, LoRA) and update.bias is None for update in updates):
        if sum(part.run.parts for part in parts) == of and (whole := _stacked(updates)) is not None:
            return whole, ""
        return None, f"{updates[0].method} on parts of a fused weight cannot be joined into one update of that weight"
    if shared:
        return updates[0].replace(B=_under(updates, rows, unit * of)), ""
    return _block_diagonal(updates, rows, unit * of, fold)


def _stacked(updates: Sequence[Update]) -> Update | None:
    """Stack the rows of updates into one update; None if the updates differ in more than these rows."""
    first = updates[0]
    if any(type(u) is not type(first) or u.attributes != first.attributes for u in updates):
        return None
    if any(u.tensors.keys() != first.tensors.keys() for u in updates):
        return None
    rows = _with_rows(first)
    if not rows:
        # An update of inputs acts on all rows in the same way. So equal updates of all parts are one update of the
        # whole.
        return first if first.cuts("out") and _alike(updates, first.tensors) else None
    if not _alike(updates, [name for name in first.tensors if name not in rows]):
        return None
    changes = {}
    for name, axis in rows.items():
        leaves = [as_lazy(u.tensors[name]) for u in updates]
        sizes = [leaf.shape[axis] for leaf in leaves]
        edges = [0, *accumulate(sizes)]
        shape = (*leaves[0].shape[:axis], edges[-1], *leaves[0].shape[axis + 1 :])
        if axis:
            return None
        changes[name] = place([(edge, None, leaf) for edge, leaf in zip(pairwise(edges), leaves, strict=True)], shape)
    return first.replace(**changes)


def _with_rows(update: Update) -> dict[str, int]:
    """Map each field with one row per output to the axis of its rows; empty if the rows are not independent."""
    if isinstance(update, LoKr):
        return {"w1" if update.w1 is not None else "w1_a": 0} if not update.stacked else {}
    if isinstance(update, OFT) and update.side == "out":
        name = "square" if update.square is not None else "pairs"
        free = not update.constraint and not update.coft
        return {name: 0, **({"rescale": 0} if update.rescale is not None else {})} if free else {}
    if not update.cuts("out"):
        return {}
    found = {name: update.tensor_fields()[name].metadata["axes"].index("out") for name in update.tensors}
    return {name: axis for name, axis in found.items() if axis is not None}


def _alike(updates: Sequence[Update], names: Iterable[str]) -> bool:
    """Whether the named tensors are equal in all updates."""
    return all(len({fingerprint(u.tensors[name]) for u in updates}) == 1 for name in names)


def _under(updates: Sequence[LoRA | DoRA], rows: Sequence[tuple[int, int]], out: int) -> Lazy:
    """Stack the B matrices vertically; `rows` are the rows of each B in the fused weight."""
    rank = int(updates[0].B.shape[1])
    return place([(row, (0, rank), u.B) for row, u in zip(rows, updates, strict=True)], (out, rank))


def _dense(updates: Sequence[Dense], rows: Sequence[tuple[int, int]], out: int) -> Dense:
    changes: dict[str, Lazy] = {}
    for name in ("D", "d"):
        leaves = [(row, u.tensors[name]) for row, u in zip(rows, updates, strict=True) if name in u.tensors]
        if leaves:
            rest = tuple(leaves[0][1].shape[1:])
            changes[name] = place([(row, None, leaf) for row, leaf in leaves], (out, *rest))
    return Dense(**cast(Any, changes))


def _block_diagonal(
    updates: Sequence[LoRA], rows: Sequence[tuple[int, int]], out: int, fold: bool
) -> tuple[Update | None, str]:
    scaling, blocks = updates[0].scaling, []
    for update in updates:
        ratio = update.scaling / scaling if scaling else 0.0
        if not fold and not _power_of_two(ratio):
            return None, "the parts of a fused weight have different scalings"
        blocks.append(update.B if ratio == 1 else times(update.B, ratio))
    # Parts with the same A share ranks. Example: queries, keys and values have one A; the MLP in the same weight has
    # another.
    ranks, held, end = list[tuple[int, int]](), dict[str, tuple[int, int]](), 0
    for update in updates:
        known = held.setdefault(fingerprint(update.A), (end, end + int(update.A.shape[0])))
        ranks.append(known)
        end = max(end, known[1])
    tail = tuple(updates[0].A.shape[1:])
    A = place([(rank, None, u.A) for rank, u in zip(ranks, updates, strict=True)], (end, *tail))
    B = place([(row, rank, b) for row, rank, b in zip(rows, ranks, blocks, strict=True)], (out, end))
    return LoRA(A=cast(Any, A), B=cast(Any, B), bias=None, scaling=scaling), ""


def _power_of_two(ratio: float) -> bool:
    return ratio > 0 and math.frexp(ratio)[0] == 0.5 and 2.0**-8 <= ratio <= 2.0**8


def _shared(updates: Sequence[Update]) -> bool:
    """Whether all updates have the same A and the same scaling."""
    pairs = [update for update in updates if isinstance(update, LoRA | DoRA)]
    if len(pairs) < len(updates) or len({pair.scaling for pair in pairs}) > 1:
        return False
    if all(pair.A is pairs[0].A for pair in pairs):
        return True
    return len({fingerprint(pair.A) for pair in pairs}) == 1


Place = tuple[tuple[int, int], tuple[int, int] | None, Any]


def place(parts: Iterable[Place], shape: tuple[int, ...]) -> Lazy:
    """Copy tensors into a tensor of zeros, with the tensors' dtype, or float32 if the tensors' dtypes differ."""
    kept = [(rows, columns, as_lazy(leaf)) for rows, columns, leaf in parts]
    kinds = {leaf.dtype.name for _, _, leaf in kept}
    dtype = kept[0][2].dtype if len(kinds) == 1 else DTYPES["F32"]

    def fetch() -> bytes:
        import numpy as np

        whole = np.zeros(shape, dtype.numpy)
        for rows, columns, leaf in kept:
            there = (slice(*rows),) if columns is None else (slice(*rows), slice(*columns))
            whole[there] = leaf.numpy() if len(kinds) == 1 else as_array(leaf).astype("<f4")
        return whole.tobytes()

    return Lazy(shape, dtype, fetch)
