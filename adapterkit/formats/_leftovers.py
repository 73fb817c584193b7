"""What a format's reader leaves behind in an adapter for its writer, as a typed record."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from ..errors import Malformed

if TYPE_CHECKING:
    from ..adapter import Adapter

T = TypeVar("T")


def leftovers(adapter: Adapter, format: str, record: type[T]) -> T:  # noqa: A002 - the public contract's word
    """The leftovers of an adapter that was read from this format; a record of defaults for any other.

    Raises:
        Malformed: they are damaged.
    """
    if adapter.foreign is None or adapter.foreign.format != format:
        return record()
    try:
        return msgspec.convert(dict(adapter.foreign.data), record)
    except msgspec.ValidationError as error:
        why = f"leftovers of {format} are damaged ({error})"
        raise Malformed(why, where="foreign", cure="Drop them") from None
