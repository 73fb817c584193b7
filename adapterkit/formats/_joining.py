"""Join LoRAs of different rows of a weight into one LoRA of the whole weight.

For example, a base may store gate and up in one weight, but an adapter has one LoRA for gate and another LoRA for up.
The factors of these LoRAs are concatenated. In the joined B, rows that no LoRA changes are zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from ..core.adapter import Target
from ..core.updates import Update
from ..io import arrange
from ..io.lazy import as_lazy
from ..linalg.namespace import summed
from ..methods.lora import LoRA
from ..naming.binding.fitting import viewed

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Lazy

Updates = Mapping[Target, tuple[Update, ...]]


def with_joined_rows(
    updates: Updates, base: Checkpoint | None, sizes: Mapping[str, int] | None = None
) -> tuple[dict[Target, tuple[Update, ...]], list[str]]:
    """Join the LoRAs that change different rows of one weight, for formats that can only update whole weights.

    LoRAs with a bias are not joined.

    Args:
        updates: the updates by target.
        base: the base, which shows the number of rows of each weight.
        sizes: a map from a weight's path to its number of rows, for weights whose number of rows is known without the
            base. If neither `sizes` nor `base` has a weight, the weight's LoRAs are not joined.

    Returns:
        the updates, and one line for each joined LoRA with a larger rank than the LoRAs that it replaces. The rank
        grows unless these LoRAs have the same A. LoRAs that cannot be joined are unchanged.
    """
    groups: dict[Target, list[Target]] = {}
    for target, given in updates.items():
        if target.rows is not None and len(given) == 1 and type(given[0]) is LoRA and given[0].bias is None:
            groups.setdefault(replace(target, rows=None), []).append(target)
    outs = {whole: (sizes or {}).get(whole.path) or _rows_of(whole, base) for whole in groups}
    joined = {
        whole: _joined([(target, cast(LoRA, updates[target][0])) for target in parts], outs[whole])
        for whole, parts in groups.items()
        if outs[whole] and whole not in updates and _apart(parts)
    }
    result: dict[Target, tuple[Update, ...]] = {}
    for target, given in updates.items():
        whole = replace(target, rows=None)
        result |= {whole: (joined[whole],)} if target in groups.get(whole, ()) and whole in joined else {target: given}
    lines = [
        f"joined {len(groups[whole])} LoRAs on rows of {whole} into one of rank {_rank(update, whole)}"
        for whole, update in joined.items()
        if _rank(update, whole) != _rank(updates[groups[whole][0]][0], whole)
    ]
    return result, lines


def with_one_lora(updates: Updates) -> tuple[dict[Target, tuple[Update, ...]], list[str]]:
    """Join all updates of a target into one LoRA, if all of them are LoRAs without a bias.

    For example, a base may interleave the rows of gate and up in one weight. In this case, the LoRA of gate and the
    LoRA of up have the same target.

    Args:
        updates: the updates by target.

    Returns:
        the updates, and one line for each joined LoRA with a larger rank than the LoRAs that it replaces. The rank
        grows unless all LoRAs of a target have the same A and change different rows.
    """
    result = dict(updates)
    lines = []
    for target, given in updates.items():
        if len(given) > 1 and all(type(each) is LoRA and each.bias is None for each in given):
            one = _summed(cast("tuple[LoRA, ...]", given), int(target.stacked))
            result[target] = (one,)
            if _rank(one, target) != _rank(given[0], target):
                lines.append(f"joined {len(given)} LoRAs of {target} into one of rank {_rank(one, target)}")
    return result, lines


def _summed(given: Sequence[LoRA], axis: int) -> LoRA:
    first = _leading(given)
    As = [as_lazy(update.A) for update in given]
    Bs = [_scaled(as_lazy(u.B), u.scaling / first.scaling if first.scaling else 1.0) for u in given]
    if all(A.shape == As[0].shape and arrange.equal(A, As[0]) for A in As) and _disjoint(Bs, axis):
        return first.replace(A=As[0], B=arrange.overlaid(Bs))
    return first.replace(A=arrange.joined(As, axis), B=arrange.joined(Bs, axis + 1))


def _leading(given: Sequence[LoRA]) -> LoRA:
    """Return the LoRA whose scaling the joined LoRA gets: the first with a scaling other than 0, else the first."""
    return next((update for update in given if update.scaling), given[0])


def _disjoint(Bs: Sequence[Lazy], axis: int) -> bool:
    """Whether each row is nonzero in at most one of the matrices. If so, the sum of the matrices is exact."""
    from ..io.lazy import as_array

    writers = summed((as_array(B) != 0).any(axis=axis + 1).astype(int) for B in Bs)
    return bool((writers <= 1).all())


def _rows_of(target: Target, base: Checkpoint | None) -> int:
    if base is None:
        return 0
    stored = next((base.tensors[n] for n in (f"{target.path}.weight", target.path) if n in base.tensors), None)
    shape = None if stored is None else viewed(stored.shape, target)
    return 0 if shape is None else shape[int(target.stacked)]


def _apart(parts: Sequence[Target]) -> bool:
    """Whether the row ranges of the targets do not overlap."""
    spans = sorted(target.rows for target in parts if target.rows is not None)
    return all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def _joined(parts: Sequence[tuple[Target, LoRA]], out: int) -> LoRA:
    parts = sorted(parts, key=lambda part: part[0].rows or (0, 0))
    axis = int(parts[0][0].stacked)
    first = _leading([update for _, update in parts])
    scaling = first.scaling
    As = [as_lazy(update.A) for _, update in parts]
    Bs = [_scaled(as_lazy(update.B), update.scaling / scaling if scaling else 1.0) for _, update in parts]
    rows = [target.rows or (0, out) for target, _ in parts]
    if all(A is As[0] or (A.shape == As[0].shape and A.fetch() == As[0].fetch()) for A in As):
        pieces, at = [], 0
        for B, (start, stop) in zip(Bs, rows, strict=True):
            pieces += [*blank(B, start - at, axis), B]
            at = stop
        whole = arrange.joined([*pieces, *blank(Bs[-1], out - at, axis)], axis)
        return first.replace(A=As[0], B=whole)
    columns = [
        arrange.joined([*blank(B, start, axis), B, *blank(B, out - stop, axis)], axis)
        for B, (start, stop) in zip(Bs, rows, strict=True)
    ]
    return first.replace(A=arrange.joined(As, axis), B=arrange.joined(columns, axis + 1))


def _scaled(B: Lazy, factor: float) -> Lazy:
    # The joined LoRA has the scaling of one of the LoRAs; see `_leading`. So multiply the B of each other LoRA by the
    # quotient of the two scalings in float32 or float64.
    return B if factor == 1 else arrange.times(arrange.widened(B, "F64" if B.dtype.name == "F64" else "F32"), factor)


def blank(like: Lazy, count: int, axis: int) -> list[Lazy]:
    """Return a list with a tensor of zeros that has `count` items along `axis`; empty if `count` is 0.

    The tensor's dtype and its other axes are those of `like`.
    """
    shape = (*like.shape[:axis], count, *like.shape[axis + 1 :])
    return [arrange.zeros(shape, like.dtype)] if count else []


def _rank(update: Update, target: Target) -> int:
    return int(update.tensors["A"].shape[int(target.stacked)])
