"""What a combination will look like, before anything is computed: a format can refuse it then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..errors import AdapterkitError, Unrepresentable
from ..io.lazy import Lazy, NotComputed, as_lazy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.adapter import Target
    from ..core.updates import Update
    from ..io.lazy import DType, Leaf


def unread(leaf: Leaf) -> Lazy:
    """A tensor of the same shape and type that cannot be read."""
    known = as_lazy(leaf)
    return unknown(known.shape, known.dtype)


def unknown(shape: Sequence[int], dtype: DType) -> Lazy:
    """A tensor that is not computed yet, and cannot be read."""

    def fetch() -> Any:
        raise NotComputed

    return Lazy(tuple(shape), dtype, fetch)


def outlined(updates: dict[Target, tuple[Update, ...]], like: Adapter) -> Adapter:
    """An adapter of such updates, none of whose tensors can be read."""
    blank = {target: tuple(update.map(unread) for update in found) for target, found in updates.items()}
    return like.replace(updates=blank)


def check_writable(outline: Adapter, write: Callable[[Adapter], Any], what: str) -> None:
    """Refuse a result that a format cannot hold; a writer refuses what it cannot say before it reads any tensor.

    Args:
        outline: see `outlined`.
        write: writes an adapter to a folder that is thrown away.
        what: the format and the method, for messages.

    Raises:
        Unrepresentable: in one line, with the first of the updates that have no place in the format.
    """
    try:
        write(outline)
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
