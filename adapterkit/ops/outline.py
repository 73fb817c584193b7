"""Outline a combination before it is computed, so that a format can refuse it early."""

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
    """Return a tensor of the same shape and dtype that cannot be read."""
    known = as_lazy(leaf)
    return unknown(known.shape, known.dtype)


def unknown(shape: Sequence[int], dtype: DType) -> Lazy:
    """Return a tensor that is not computed yet and cannot be read."""

    def fetch() -> Buffer:
        raise NotComputed

    return Lazy(tuple(shape), dtype, fetch)


def blank(updates: Mapping[Target, tuple[Update, ...]]) -> dict[Target, tuple[Update, ...]]:
    """Return the same updates without readable tensors."""
    return {target: tuple(update.map(unread) for update in found) for target, found in updates.items()}


def check_writable(outline: Adapter, write: Callable[[Adapter], object], what: str) -> None:
    """Check that a format can hold a result; writers check that before they read any tensor.

    Args:
        outline: the adapter with its lineage and `blank` updates.
        write: a function that writes an adapter to a temporary folder.
        what: the format and the method, for messages.

    Raises:
        Unrepresentable: the format cannot hold some updates; the message names the first.
    """
    try:
        write(outline)
    # The writer accepted the outline and then tried to read a tensor.
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
