"""Store file contents that adapter fields cannot express (leftovers) in the adapter, for the same format's writer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict, TypeVar

import msgspec

from ..errors import Malformed

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..io.lazy import Lazy

T = TypeVar("T")
L = TypeVar("L", bound="Leftovers")


def leftovers(adapter: Adapter, format: str, record: type[T]) -> T:  # noqa: A002 - the public contract's word
    """Return the leftovers of an adapter that was read from this format; for any other adapter, an empty `record`.

    Raises:
        Malformed: the leftovers are damaged.
    """
    if adapter.foreign is None or adapter.foreign.format != format:
        return record()
    try:
        return msgspec.convert(dict(adapter.foreign.data), record)
    except msgspec.ValidationError as error:
        why = f"the stored data of the {format} file is damaged ({error})"
        raise Malformed(why, where="foreign", cure="Remove the data: adapter.replace(foreign=None)") from None


class Leftovers(TypedDict, total=False):
    """The leftovers that every reader stores in the adapter for the writer of the same format: the order of keys."""

    order: list[str]


def remembered(adapter: Adapter, name: str, shape: type[L]) -> L:
    """Return the leftovers of an adapter that was read from this format, as a dict; empty for any other adapter.

    Raises:
        Malformed: the leftovers are damaged.
    """
    return leftovers(adapter, name, shape)


def in_order(tensors: Mapping[str, Lazy], remembered: Leftovers) -> dict[str, Lazy]:
    """Return the tensors in the key order of the source file, if this order is known; new tensors come last."""
    read = {key: tensors[key] for key in remembered.get("order", ()) if key in tensors}
    return {**read, **tensors}
