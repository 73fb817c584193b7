"""Helpers that formats share.

They group A and B factors, choose a file's alpha, use the details of the source file in `adapter.foreign`, and refuse
or omit updates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import msgspec

from ..errors import WRITE_ADAPTERKIT, WRITE_AGAIN, Malformed, ShapeMismatch, Unrepresentable, Unsupported, shown
from ..io.arrange import REAL, joined, padded, part, reordered, times
from ..io.lazy import Lazy, as_lazy, dtype_of
from ..methods.alora import ALoRA
from ..methods.dora import DoRA
from ..methods.lora import LoRA
from ..naming.ties import EMBEDDINGS

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target, Updates
    from ..core.updates import Update
    from ..io.arrange import Order
    from ..io.checkpoint import Checkpoint


# Shared code for language-model formats that store one pair of factors, A and B, for each module.
#
# Most of these formats support only LoRA, or LoRA and DoRA. The formats differ in the tensors' names, in the order of
# axes and rows, and in where the scaling is stored.


Pair = LoRA | DoRA | ALoRA
Pairs = dict["Target", Pair]
Slots = dict[str, Any]
"""A map from the fields of an update, such as `A`, to the tensors of one module in a file."""

EXACT = 1 << 53
"""A float represents every integer up to 2**53 exactly. Integers in JSON and YAML may be larger."""

LARGEST_RANK = 1 << 31


def grouped(tensors: Mapping[str, Lazy], slots: Mapping[str, str], what: str) -> dict[str, Slots]:
    """Group the tensors of a file by module, then by field of the update. The ending of a key determines the field.

    Args:
        tensors: the tensors by key.
        slots: a map from endings of keys, such as `.lora_A.weight`, to fields of the update. Every module must have the
            fields A and B.
        what: the name of the format or of its files, for messages.

    Raises:
        Malformed: a key has no known ending, a module lacks A or B, or there are no tensors.
        Unsupported: a tensor's dtype is not one of `REAL`.
    """
    groups: dict[str, Slots] = {}
    for key, tensor in tensors.items():
        end = next((end for end in slots if key.endswith(end)), None)
        if end is None or key == end:
            endings = " or ".join(slots)
            raise Malformed(f"this is not a key of {what}", where=key, cure=f"Each key must end in {endings}")
        if tensor.dtype.name not in REAL:
            raise Unsupported(
                f"this tensor has dtype {tensor.dtype}", where=key, cure=f"Convert it to {' or '.join(REAL)}"
            )
        groups.setdefault(key.removesuffix(end), {})[slots[end]] = tensor
    if not groups:
        raise Malformed("the file has no tensors", cure=WRITE_AGAIN)
    for module, fields in groups.items():
        missing = next((end for end, field in slots.items() if field in ("A", "B") and field not in fields), None)
        if missing is not None:
            raise Malformed(f"this module has no {missing.lstrip('.')}", where=module, cure=WRITE_AGAIN)
    return groups


def pair(slots: Slots, scaling: float) -> Pair:
    """Create a DoRA if `slots` has a magnitude, otherwise a LoRA."""
    return DoRA(**slots, scaling=scaling) if "magnitude" in slots else LoRA(**slots, scaling=scaling)


def check_factors(where: str, slots: Slots) -> int:
    """Check that A has the shape `[rank, in]` and B the shape `[out, rank]`, and return the rank.

    Raises:
        ShapeMismatch: A and B do not have these shapes, or the rank is 0.
    """
    A, B = slots["A"].shape, slots["B"].shape
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0]:
        why = f"A has the shape {list(A)} and B {list(B)}, but they must be [rank, in] and [out, rank]"
        raise ShapeMismatch(why, where=where, cure=WRITE_AGAIN)
    return int(A[0])


def expressible(
    adapter: Adapter,
    format_name: str,
    on_loss: str,
    why: Callable[[Target, Pair], str],
    methods: tuple[type[Pair], ...] = (LoRA,),
    dtypes: Collection[str] = REAL,
) -> tuple[Pairs, list[str]]:
    """Return the updates that the format can express, and a line for each omitted update.

    Use this function for a format that stores one pair of factors, A and B, for each module.

    Args:
        adapter: the adapter to write.
        format_name: the format's name, for messages.
        on_loss: `drop` omits updates that the format cannot express. With any other value, such updates are an error.
        why: a function that returns the reason why the format cannot express an update; empty if the format can. The
            function is called only for updates with one of the `methods`.
        methods: the methods that the format supports.
        dtypes: the names of the allowed dtypes. Integer tensors are not checked. The default, `REAL`, contains the
            dtypes that `grouped` accepts. A writer that converts tensors can pass other dtypes.

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
            reason = why(target, update) or (f"its tensors have dtype {', '.join(sorted(other))}" if other else "")
            reason = reason or ("the target has more than one update" if target in kept else "")
        if reason:
            items.append(f"{target}: {reason}")
            places.append((target, position))
        elif isinstance(update, Pair):
            kept[target] = update
    if items and on_loss != "drop":
        cure = "Omit them with --on-loss drop (on_loss='drop'), or write adapterkit's format: --to adapterkit"
        raise Unrepresentable(f"{format_name} cannot express these updates", items=items, cure=cure, places=places)
    if not kept:
        cure = WRITE_ADAPTERKIT
        raise Unrepresentable(f"{format_name} can express none of the adapter's updates", items=items, cure=cure)
    return kept, [f"left out {item}" for item in items]


def _kinds(update: Pair) -> set[str]:
    """Return the dtype names of an update's tensors, except integer tensors such as an aLoRA's invocation tokens."""
    fields = update.tensor_fields()
    return {dtype_of(leaf).name for n, leaf in update.tensors.items() if not fields[n].metadata["integer"]}


def unfit(target: Target, update: Pair, *, stacked: bool = False, bias: bool = False) -> str:
    """Return the reason why two plain matrices A and B cannot express an update; empty if they can.

    With `stacked`, updates of stacked experts are allowed. With `bias`, updates with a bias are allowed.
    """
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
    """Reorder an update's rows (its outputs), for formats that store the rows of a weight in another order."""
    changes = {}
    for name, leaf in update.tensors.items():
        axis = update.tensor_fields()[name].metadata["axes"].index("out")
        if axis is not None:
            changes[name] = reordered(as_lazy(leaf), order, axis)
    return update.replace(**changes)


def of_rows(update: Pair, start: int, stop: int) -> Pair:
    """Return the part of an update that changes the rows `start:stop` of a fused weight. A stays the same."""
    names = [name for name, field in update.tensor_fields().items() if field.metadata["axes"].index("out") == 0]
    tensors = update.tensors
    return update.replace(**{name: part(as_lazy(tensors[name]), start, stop) for name in names if name in tensors})


def over_rows(updates: Iterable[Pair]) -> Pair:
    """Join updates of consecutive row blocks into one update of the fused weight.

    All of these updates must have the same A and the same scaling.
    """
    first, *others = updates
    names = [name for name, field in first.tensor_fields().items() if field.metadata["axes"].index("out") == 0]
    names_present = [name for name in names if name in first.tensors]
    return first.replace(**{n: joined([as_lazy(u.tensors[n]) for u in (first, *others)]) for n in names_present})


def is_finite(value: object, where: str) -> float:
    """Check a number in a file's settings, such as alpha.

    Returns:
        the number as a float.

    Raises:
        Malformed: the value is not a number, is not finite, or is an integer larger than `EXACT`.
    """
    if type(value) is int and abs(value) <= EXACT:
        return float(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    cure = f"Replace the value with a finite number; the largest allowed integer is {EXACT}"
    raise Malformed(f"{shown(value)} is not a finite number", where=where, cure=cure)


def whole_rank(value: object, where: str) -> int:
    """Check a rank in a file's settings.

    Raises:
        Malformed: the value is not an integer from 1 to 2 ** 31.
    """
    if type(value) is not int or not 1 <= value <= LARGEST_RANK:
        cure = f"Replace the value with an integer from 1 to {LARGEST_RANK}"
        raise Malformed(f"{shown(value)} is not a rank", where=where, cure=cure)
    return value


def stored_layout(path: str, update: Pair, base: Checkpoint | None) -> str:
    """Return the layout in which the base stores a weight.

    If the base has the weight, and the weight is a matrix that is not square, the weight's shape shows the layout.
    Otherwise, the layout is assumed: `in out *k` if the path ends with the name of an embedding, and `out *in` for all
    other paths.
    """
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    out, in_ = update.B.shape[0], update.A.shape[1]
    if weight is not None and len(weight.shape) == 2 and out != in_:
        return "in out *k" if weight.shape == (in_, out) else "out *in"
    return "in out *k" if path.rpartition(".")[2] in EMBEDDINGS else "out *in"


# Choose the alpha or scaling for files that store a single value for all modules. If a module's update has another
# scaling, fold the update's scaling into B.


def of_one_alpha(
    adapter: Adapter,
    why: Callable[[Target, Pair], str],
    *,
    format_name: str,
    on_loss: str,
    first: float | None = None,
    one_rank: bool = False,
) -> tuple[float, Pairs, list[str]]:
    """Return the file's alpha, the updates that the format can express, and a line for each omitted or changed update.

    Args:
        adapter: the adapter to write.
        why: a function that returns the reason why the format cannot express an update; empty if the format can.
        format_name: the format's name, for messages.
        on_loss: `drop` omits updates that the format cannot express; `fold` and `promote` allow folding scalings.
        first: the source file's alpha; None if unknown.
        one_rank: whether the format needs the same rank in all modules. Smaller ranks are then padded with zeros.

    Raises:
        Unrepresentable: see `expressible` and `one_number`.
    """
    pairs, lines = expressible(adapter, format_name, on_loss, why)
    pairs_left = of_one_rank(pairs) if one_rank else pairs
    alpha, pairs_left, folded = one_alpha(pairs_left, format_name=format_name, on_loss=on_loss, first=first)
    return alpha, pairs_left, lines + folded


def one_alpha(
    pairs: Mapping[Target, Pair], *, format_name: str, on_loss: str, first: float | None = None
) -> tuple[float, Pairs, list[str]]:
    """Choose the alpha of a file in which every module's scaling is `alpha / rank`; see `one_number`."""
    from .peft.patterns import exact_alpha

    def rank(update: Pair) -> int:
        # The rank is always B's last axis. In A, it is the first axis, or the second if the experts are stacked.
        return int(update.B.shape[-1])

    return one_number(
        pairs, lambda u: exact_alpha((rank(u), u.scaling), False), lambda alpha, u: alpha / rank(u),
        format_name=format_name, on_loss=on_loss, default=float(rank(next(iter(pairs.values())))), first=first,
    )  # fmt: skip


def of_one_rank(pairs: Pairs) -> Pairs:
    """Pad all updates with zeros to the largest rank among them. The updates still compute the same functions."""
    rank = max(map(rank_of, pairs.values()))
    return {target: to_rank(update, rank) for target, update in pairs.items()}


def one_number(
    pairs: Mapping[Target, Pair],
    of: Callable[[Pair], float | None],
    gives: Callable[[float, Pair], float],
    *,
    format_name: str,
    on_loss: str,
    default: float,
    first: float | None = None,
) -> tuple[float, Pairs, list[str]]:
    """Choose the single value in a file, such as alpha, from which a tool computes the scaling of every module.

    If the tool would compute the wrong scaling for an update, the difference is folded into the update's B.

    Args:
        pairs: the updates by target.
        of: a function of an update. It returns the value from which the tool computes exactly the update's scaling, or
            None if there is no such value.
        gives: a function of a value and an update. It returns the scaling that the tool computes for the update if the
            file stores this value.
        format_name: the format's name, for messages.
        on_loss: `fold` and `promote` allow folding scalings.
        default: the value to use if `of` returns None for every update.
        first: the source file's value. It breaks ties between values that fit the same number of updates.

    Raises:
        Unrepresentable: the tool would compute the wrong scaling for an update, and `on_loss` does not allow folding.

    Returns:
        the value, the updates, and one line for each folded scaling.
    """
    count = Counter(number for number in map(of, pairs.values()) if number)
    ranked = sorted(count, key=lambda number: (-count[number], number != first, -number))
    number = ranked[0] if ranked else default
    needy = {t: gives(number, u) for t, u in pairs.items() if gives(number, u) != u.scaling}
    if needy and on_loss not in FOLDING:
        items = [
            f"{target}: its scaling is {pairs[target].scaling:g}, but the file would give it {value:g}"
            for target, value in needy.items()
        ]
        raise Unrepresentable(f"{format_name} stores one scaling for all modules", items=items, cure=_ALLOW)
    changed = {t: folded(u, needy[t]) if t in needy else u for t, u in pairs.items()}
    return number, changed, [f"folded the scaling into B of {target}" for target in needy]


def of_no_number(pairs: Pairs, *, format_name: str, on_loss: str) -> tuple[Pairs, list[str]]:
    """Fold every scaling into B, for formats that store no scalings.

    Return the updates, and a line for each update that changed.

    Raises:
        Unrepresentable: a scaling is not 1, and `on_loss` does not allow folding.
    """
    needy = [target for target, update in pairs.items() if update.scaling != 1]
    if needy and on_loss not in FOLDING:
        items = [f"{target}: its scaling is {pairs[target].scaling:g}" for target in needy]
        raise Unrepresentable(f"{format_name} stores no scaling", items=items, cure=_ALLOW)
    plain = {target: folded(update, 1.0) for target, update in pairs.items()}
    return plain, [f"folded the scaling into B of {target}" for target in needy]


def folded(update: Pair, scaling: float) -> Pair:
    """Set an update's scaling, and multiply B and the bias by `old scaling / new scaling`.

    The returned update computes the same function as before, up to one rounding.
    """
    if update.scaling == scaling:
        return update
    factor = update.scaling / scaling
    scaled = {name: times(as_lazy(update.tensors[name]), factor) for name in ("B", "bias") if name in update.tensors}
    return update.replace(scaling=scaling, **scaled)


def whole_number(value: float) -> float:
    """Convert a whole float to an int (16.0 to 16), because tools write whole numbers as integers.

    Floats with an absolute value of 2**53 or more stay floats.
    """
    return int(value) if float(value).is_integer() and abs(value) < 1 << 53 else value


FOLDING = ("fold", "promote")
"""The values of `on_loss` that allow folding a scaling."""

_ALLOW = "Allow folding the scaling into B with --on-loss fold (on_loss='fold')"

# `Adapter.foreign` stores the details of the source file that an adapter's updates cannot express. The writer of the
# same format writes them again. The names `leftovers` and `Leftovers` mean these details.


T = TypeVar("T")


def leftovers(adapter: Adapter, format: str, record: type[T]) -> T:  # noqa: A002 - the public contract's word
    """Return `adapter.foreign.data` as a `record`. If the adapter is not from this format, return an empty `record`.

    Raises:
        Malformed: the data does not fit the type `record`.
    """
    if adapter.foreign is None or adapter.foreign.format != format:
        return record()
    try:
        return msgspec.convert(dict(adapter.foreign.data), record)
    except msgspec.ValidationError as error:
        why = f"the stored data of the {format} file is damaged ({error})"
        raise Malformed(why, where="foreign", cure="Remove the data: adapter.replace(foreign=None)") from None


class Leftovers(TypedDict, total=False):
    """Data that every reader may store in `Adapter.foreign`: `order`, the keys of the source file in their order."""

    order: list[str]


def in_order(tensors: Mapping[str, Lazy], remembered: Leftovers) -> dict[str, Lazy]:
    """Return the tensors in the key order of the source file, if known. Tensors with new keys come last."""
    read = {key: tensors[key] for key in remembered.get("order", ()) if key in tensors}
    return {**read, **tensors}


# Find updates that a format cannot express, and refuse or omit them.


Loss = tuple["Target", int, str]
"""(target, index of the update, reason why the format cannot express the update)."""


def all_expressible(
    updates: Updates, find: Callable[[Updates], Iterable[Loss]], *, format_name: str, place: str, on_loss: str
) -> tuple[Updates, list[str]]:
    """Return the updates that one file of the format can store together, and a line for each omitted update.

    Args:
        updates: the updates to write.
        find: a function that returns a `Loss` for each update that the format cannot express. After updates are
            omitted, `find` is called again on the remaining updates, until `find` returns nothing.
        format_name: the format's name, for messages.
        place: a phrase for messages that names the output, such as "a file of this format".
        on_loss: `drop` omits updates that the format cannot express. With any other value, these updates are an error.

    Raises:
        Unrepresentable: some updates cannot be expressed and `on_loss` is not `drop`, or no update can be expressed.
    """
    lines: list[str] = []
    while losses := [*find(updates)]:
        items = [f"{target}: {why}" for target, _, why in losses]
        if on_loss != "drop":
            cure = "Omit them with --on-loss drop (on_loss='drop'), or write adapterkit's format: --to adapterkit"
            places = [(target, position) for target, position, _ in losses]
            raise Unrepresentable(f"{format_name} cannot express these updates", items=items, cure=cure, places=places)
        lines += [f"left out {item}" for item in items]
        updates = _without(updates, {(target, position) for target, position, _ in losses})
    if not updates:
        cure = WRITE_ADAPTERKIT
        raise Unrepresentable(f"{place} can express none of the adapter's updates", items=lines, cure=cure)
    return updates, lines


def _without(updates: Updates, lost: set[tuple[Target, int]]) -> dict[Target, tuple[Update, ...]]:
    kept = {t: tuple(u for i, u in enumerate(group) if (t, i) not in lost) for t, group in updates.items()}
    return {target: group for target, group in kept.items() if group}
