"""What a file held that the model has no home for: enough to write the same file again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated

import msgspec

from ...core.adapter import Adapter
from ...io.lazy import as_lazy
from .._leftovers import leftovers

if TYPE_CHECKING:
    from ...io.lazy import Leaf

Size = Annotated[int, msgspec.Meta(ge=0)]


class Hints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The leftovers.

    Attributes:
        metadata: keys and values of the header, in their order.
        stems: target -> name of the module in the file's keys.
        keys: key that the writer would choose -> key that the file had.
        shapes: key -> shape that the file had, where the writer would choose another of as many elements.
        without_alpha: modules that had no alpha.
        derived: key of a tensor that is only kept -> fingerprint of the field that was computed from it.
        idle: key of a tensor that is only kept, since it has no effect -> its target.
        compat: the reading that was asked for.
    """

    metadata: list[tuple[str, str]] = []
    stems: dict[str, str] = {}
    keys: dict[str, str] = {}
    shapes: dict[str, list[Size]] = {}
    without_alpha: list[str] = []
    derived: dict[str, str] = {}
    idle: dict[str, str] = {}
    compat: str | None = None


def hints_of(adapter: Adapter, format: str) -> Hints:  # noqa: A002 - the public contract's word
    """The leftovers of an adapter that was read from this format; empty ones for any other.

    Raises:
        Malformed: they are damaged.
    """
    return leftovers(adapter, format, Hints)


def fingerprint(leaf: Leaf) -> str:
    """sha256 over a tensor's type, shape and bytes."""
    tensor = as_lazy(leaf)
    head = f"{tensor.dtype.name} {list(tensor.shape)}\n"
    return hashlib.sha256(head.encode() + bytes(tensor.fetch())).hexdigest()
