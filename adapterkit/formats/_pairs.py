"""Shared code for language-model formats that store one pair of factors, A and B, for each module.

Most of these formats support only LoRA, or LoRA and DoRA. They differ in names, in the order of axes and rows, and in
where the scaling is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, ShapeMismatch, Unrepresentable, Unsupported, shown
from ..io.arrange import REAL, joined, padded, part, reordered
from ..io.lazy import Lazy, as_lazy, dtype_of
from ..methods.alora import ALoRA
from ..methods.dora import DoRA
from ..methods.lora import LoRA
from ..naming.ties import EMBEDDINGS

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..io.arrange import Order
    from ..io.checkpoint import Checkpoint

Pair = LoRA | DoRA | ALoRA
Pairs = dict["Target", Pair]
Slots = dict[str, Any]
"""The tensors of one module, by field of the update."""

EXACT = 1 << 53
"""The largest integer up to which floats are exact; integers in JSON and YAML may be larger."""

LARGEST_RANK = 1 << 31

DAMAGED = "Write the file again with the tool that made it"


def grouped(tensors: Mapping[str, Lazy], slots: Mapping[str, str], what: str) -> dict[str, Slots]:
    """Group tensors by module, then by the update's field; the ending of a key determines the field.

    Args:
        tensors: the tensors by key.
        slots: a map from the ending of a key to the update's field; every module must have the fields A and B.
        what: the format's name, for messages.

    Raises:
        Malformed: a key has no known ending, or a module lacks A or B.
        Unsupported: a factor's dtype is not a type of real numbers.
    """
    groups: dict[str, Slots] = {}
    for key, tensor in tensors.items():
        end = next((end for end in slots if key.endswith(end)), None)
        if end is None or key == end:
            raise Malformed(f"this is not a key of {what}", where=key, cure=f"Its keys end in {', '.join(slots)}")
        if tensor.dtype.name not in REAL:
            raise Unsupported(
                f"this factor has dtype {tensor.dtype}", where=key, cure=f"Convert it to {', '.join(REAL)}"
            )
        groups.setdefault(key.removesuffix(end), {})[slots[end]] = tensor
    if not groups:
        raise Malformed("the file has no tensors", cure=DAMAGED)
    for module, found in groups.items():
        missing = next((end for end, field in slots.items() if field in ("A", "B") and field not in found), None)
        if missing is not None:
            raise Malformed(f"this module has no {missing.lstrip('.')}", where=module, cure=DAMAGED)
    return groups


def pair(slots: Slots, scaling: float) -> Pair:
    """Create a DoRA if a magnitude is among the tensors, otherwise a LoRA."""
    return DoRA(**slots, scaling=scaling) if "magnitude" in slots else LoRA(**slots, scaling=scaling)


def check_factors(where: str, slots: Slots) -> int:
    """Check the shapes of A, `[rank, in]`, and B, `[out, rank]`, and return the rank.

    Raises:
        ShapeMismatch: A and B do not have these shapes.
    """
    A, B = slots["A"].shape, slots["B"].shape
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0]:
        raise ShapeMismatch(f"A is {list(A)}, B is {list(B)}", where=where, cure=DAMAGED)
    return int(A[0])


def expressible(
    adapter: Adapter,
    dialect: str,
    on_loss: str,
    why: Callable[[Target, Pair], str],
    methods: tuple[type[Pair], ...] = (LoRA,),
    dtypes: Collection[str] = REAL,
) -> tuple[Pairs, list[str]]:
    """Return the updates that a format with one pair per module can express, and a line for each omitted update.

    Args:
        adapter: the adapter to write.
        dialect: the format's name, for messages.
        on_loss: how to treat updates that the format cannot express.
        why: a function that returns the reason why the format cannot express an update; empty if it can. The update
            already has one of the `methods`.
        methods: the methods that the format supports.
        dtypes: the dtypes that A and B may have: those that the format's reader accepts (see `grouped`), or those that
            the writer converts.

    Raises:
        Unrepresentable: some updates cannot be expressed and `on_loss` is not `drop`, or no update can be expressed.
    """
    kept: Pairs = {}
    items: list[str] = []
    places: list[tuple[Target, int]] = []
    for target, position, update in ((t, i, u) for t, us in adapter.updates.items() for i, u in enumerate(us)):
        if not isinstance(update, methods):
            reason = f"{update.method} is not supported, only {' and '.join(m.__name__ for m in methods)}"
        else:
            other = _kinds(update) - {*dtypes}
            reason = why(target, update) or (f"its factors have dtype {', '.join(sorted(other))}" if other else "")
            reason = reason or ("the target has more than one update" if target in kept else "")
        if reason:
            items.append(f"{target}: {reason}")
            places.append((target, position))
        elif isinstance(update, Pair):
            kept[target] = update
    if items and on_loss != "drop":
        cure = "Omit them with --on-loss drop (on_loss='drop'), or write adapterkit's format: --to adapterkit"
        raise Unrepresentable(f"{dialect} cannot express these updates", items=items, cure=cure, places=places)
    if not kept:
        cure = "Write adapterkit's format: --to adapterkit (format='adapterkit')"
        raise Unrepresentable(f"{dialect} can express none of the adapter's updates", items=items, cure=cure)
    return kept, [f"left out {item}" for item in items]


def _kinds(update: Pair) -> set[str]:
    """Return the names of the factors' dtypes; integer tensors are not factors."""
    fields = update.tensor_fields()
    return {dtype_of(leaf).name for n, leaf in update.tensors.items() if not fields[n].metadata["integer"]}


def unfit(target: Target, update: Pair, *, stacked: bool = False, bias: bool = False) -> str:
    """Return the reason why two plain matrices A and B cannot express an update; empty if they can."""
    if target.rows is not None:
        return "it changes only some rows of a weight"
    if target.stacked and not stacked:
        return "it changes stacked experts"
    if len(update.A.shape) != 2 + target.stacked:
        return "it changes a convolution"
    if isinstance(update, LoRA | ALoRA) and update.bias is not None and not bias:
        return "it has a bias"
    return ""


def rank_of(update: Pair, stacked: bool = False) -> int:
    return int(update.A.shape[int(stacked)])


def to_rank(update: Pair, rank: int, stacked: bool = False) -> Pair:
    """Pad an update to a larger rank: add zero rows to A and zero columns to B."""
    if rank_of(update, stacked) == rank:
        return update
    lead = int(stacked)
    return update.replace(A=padded(as_lazy(update.A), rank, lead), B=padded(as_lazy(update.B), rank, 1 + lead))


def in_row_order(update: Pair, order: Order) -> Pair:
    """Return the update with its rows in another order, for a weight with reordered rows."""
    changes = {}
    for name, leaf in update.tensors.items():
        axis = update.tensor_fields()[name].metadata["axes"].index("out")
        if axis is not None:
            changes[name] = reordered(as_lazy(leaf), order, axis)
    return update.replace(**changes)


def of_rows(update: Pair, start: int, stop: int) -> Pair:
    """Return an update for some rows of a fused weight, cut from the update of all rows; A stays the same."""
    names = [name for name, field in update.tensor_fields().items() if field.metadata["axes"].index("out") == 0]
    tensors = update.tensors
    return update.replace(**{name: part(as_lazy(tensors[name]), start, stop) for name in names if name in tensors})


def over_rows(updates: Iterable[Pair]) -> Pair:
    """Join updates of consecutive row blocks, with the same A and scaling, into one update of the fused weight."""
    first, *others = updates
    names = [name for name, field in first.tensor_fields().items() if field.metadata["axes"].index("out") == 0]
    held = [name for name in names if name in first.tensors]
    return first.replace(**{n: joined([as_lazy(u.tensors[n]) for u in (first, *others)]) for n in held})


def finite(value: object, where: str) -> float:
    """Check a number in a file's settings, such as alpha.

    Returns:
        the number as a float, without rounding.

    Raises:
        Malformed: the value is not a number, not finite, or an integer that a float cannot represent exactly.
    """
    if type(value) is int and abs(value) <= EXACT:
        return float(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    cure = f"Write a finite number there; an integer may be at most {EXACT}"
    raise Malformed(f"{shown(value)} is not a finite number", where=where, cure=cure)


def whole_rank(value: object, where: str) -> int:
    """Check a rank in a file's settings.

    Raises:
        Malformed: the value is not an integer from 1 to 2 ** 31.
    """
    if type(value) is not int or not 1 <= value <= LARGEST_RANK:
        cure = f"Write an integer from 1 to {LARGEST_RANK} there"
        raise Malformed(f"{shown(value)} is not a rank", where=where, cure=cure)
    return value


def stored_layout(path: str, update: Pair, base: Checkpoint | None) -> str:
    """Return the layout in which the base stores a weight.

    Without a base, assume an embedding's layout if the weight has the name of an embedding.
    """
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    out, in_ = update.B.shape[0], update.A.shape[1]
    if weight is not None and len(weight.shape) == 2 and out != in_:
        return "in out *k" if weight.shape == (in_, out) else "out *in"
    return "in out *k" if path.rpartition(".")[2] in EMBEDDINGS else "out *in"
