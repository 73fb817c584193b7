"""Build updates from computed arrays, and adapters whose lineage contains the lineages of several adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, Step
from ..core.metadata import METADATA, MODEL_TYPE, merged_metadata, model_types_of
from ..errors import AdapterkitError, Unrepresentable, Unsupported
from ..io.computed import held
from ..io.lazy import DTYPES, Lazy, NotComputed, as_lazy, dtype_named
from ..methods.dense import Dense
from ..methods.lora import LoRA

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..core.updates import Update
    from ..io.computed import Array
    from ..io.lazy import Buffer, DType, Leaf, Shape

if TYPE_CHECKING:
    Hold = Callable[[Array, DType], Lazy]


def low_rank(
    target: Target, shape: Shape, pairs: Sequence[tuple[Array, Array]], bias: Array | None, dtype: DType,
    hold: Hold = held,
) -> LoRA:  # fmt: skip
    """Build a LoRA from B `[out, r]` and A `[r, in * k]`.

    Experts' pairs are padded with zeros to one rank and stacked.

    Args:
        target: the target of the LoRA.
        shape: the shape of one weight, `[out, in, *k]`.
        pairs: (B, A) of the weight, or of each expert's weight.
        bias: the change of the bias, `[out]` or `[e, out]`, or None.
        dtype: the type to store.
        hold: a function that stores a computed array as a tensor of the update.
    """
    import numpy as np

    # Use at least rank 1, because PEFT and file formats have no LoRA of rank 0.
    rank = max(1, *(len(A) for _, A in pairs))
    B = np.stack([_filled(B, rank, 1) for B, _ in pairs])
    A = np.stack([_filled(A, rank, 0).reshape(rank, *shape[1:]) for _, A in pairs])
    if not target.stacked:
        A, B = A[0], B[0]
    return LoRA(A=hold(A, dtype), B=hold(B, dtype), bias=None if bias is None else hold(bias, dtype))  # type: ignore[arg-type]


def dense(
    target: Target, shape: Shape, changes: Sequence[Array] | None, bias: Array | None, dtype: DType, hold: Hold = held
) -> Dense:
    """Build a dense update from the differences of the weights, `[out, in * k]` each, and of the bias.

    None means no change.
    """
    import numpy as np

    D = None if changes is None else np.stack([change.reshape(shape) for change in changes])
    if D is not None and not target.stacked:
        D = D[0]
    return Dense(**{name: hold(v, dtype) for name, v in (("D", D), ("d", bias)) if v is not None})  # type: ignore[arg-type]


def balanced(U: Array, S: Array, Vh: Array) -> tuple[Array, Array]:
    """Return B = U sqrt(S) and A = sqrt(S) Vh."""
    root = S**0.5
    return U * root, root[:, None] * Vh


def result_type(adapters: Sequence[Adapter], dtype: str | None) -> DType:
    """Return the dtype of computed results: `dtype` if given, else float64 if any tensor has it, else float32.

    Raises:
        Unsupported: `dtype` is not the name of a floating type.
    """
    from ..io.lazy import dtype_of

    if dtype is None:
        names = {dtype_of(leaf).name for a in adapters for _, update in a for leaf in update.tensors.values()}
        return DTYPES["F64" if "F64" in names else "F32"]
    kind = dtype_named(dtype)
    if kind is None or not kind.floating or kind.name == "C64":
        known = ", ".join(name for name, d in DTYPES.items() if d.floating and name != "C64")
        raise Unsupported(f"factors cannot have the element type {dtype!r}", cure=f"Choose among {known}")
    return kind


def of_several(
    adapters: Sequence[Adapter], updates: Mapping[Target, tuple[Update, ...]], op: str, **args: object
) -> Adapter:
    """Return an adapter whose lineage is a step `op` that contains the lineages of `adapters`.

    The result names a base if all adapters name the same base.
    """
    bases = [adapter.base for adapter in adapters]
    base = bases[0] if all(other == bases[0] for other in bases) else None
    lineages = [[{"op": step.op, "args": dict(step.args)} for step in adapter.recipe] for adapter in adapters]
    named = [None if each is None else each.id for each in bases]
    carried = merged_metadata(adapters)
    if carried:
        args |= {METADATA: carried}
    families = {family for adapter in adapters for family in model_types_of(adapter)}
    # Record a family only if all adapters agree, because a result cannot belong to two families.
    if len(families) == 1:
        args |= {MODEL_TYPE: families.pop()}
    step = Step(op, {**args, "of": [{"base": b, "recipe": r} for b, r in zip(named, lineages, strict=True)]})
    return Adapter(updates, base, (step,))


def _filled(array: Array, rank: int, axis: int) -> Array:
    import numpy as np

    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - array.shape[axis])
    return np.pad(array, widths)


# Describe a combination's result before it is computed, so that a format can refuse the result early.


def unread(leaf: Leaf) -> Lazy:
    """Return a placeholder with the tensor's shape and dtype, which cannot be read."""
    known = as_lazy(leaf)
    return unknown(known.shape, known.dtype)


def unknown(shape: Sequence[int], dtype: DType) -> Lazy:
    """Return a placeholder for a tensor that is not computed yet; it cannot be read."""

    def fetch() -> Buffer:
        raise NotComputed

    return Lazy(tuple(shape), dtype, fetch)


def blank(updates: Mapping[Target, tuple[Update, ...]]) -> dict[Target, tuple[Update, ...]]:
    """Replace all tensors of the updates by placeholders that cannot be read."""
    return {target: tuple(update.map(unread) for update in found) for target, found in updates.items()}


def check_writable(outline: Adapter, write: Callable[[Adapter], object], what: str) -> None:
    """Check that a format can store a result, before the result is computed.

    Args:
        outline: an adapter with the result's lineage, and updates from `blank`.
        write: a function that writes an adapter to a temporary folder. Writers check updates before they read any
            tensor.
        what: the format and the method, for messages.

    Raises:
        Unrepresentable: the format cannot store some updates; the message names the first.
    """
    try:
        write(outline)
    # The writer accepted the outline: it tried to read a tensor.
    except NotComputed:
        return
    except Unrepresentable as error:
        first = f": {error.items[0]}" if error.items else f": {error.why}"
        more = f" (and {len(error.items) - 1} more)" if len(error.items) > 1 else ""
        cure = "Write --to adapterkit (format='adapterkit'), or leave them out by --on-loss drop (on_loss='drop')"
        raise Unrepresentable(f"{what}{first}{more}", cure=cure) from None
    except AdapterkitError as error:
        error.path = None
        raise
