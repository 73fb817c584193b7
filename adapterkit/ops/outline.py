"""Describe a combination's result before it is computed, so that a format can refuse the result early."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import AdapterkitError, Unrepresentable
from ..io.lazy import Lazy, NotComputed, as_lazy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..core.adapter import Adapter, Target
    from ..core.updates import Update
    from ..io.lazy import Buffer, DType, Leaf


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
