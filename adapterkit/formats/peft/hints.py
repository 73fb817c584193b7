"""What a PEFT file held that the model has no home for: enough to write the same config, keys and shapes again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from ...core.adapter import Adapter, Target
from .._leftovers import leftovers
from .keys import PREFIX

FORMAT = "peft"

Size = Annotated[int, msgspec.Meta(ge=0)]


class Hints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The leftovers.

    Attributes:
        config: the config as it was read.
        targets: fingerprint of the targets that were read: whether the config's lists of modules still hold.
        prefix: what all keys begin with.
        keys: key that the writer would choose -> key that the file had, where nothing in the updates tells.
        compat: the reading that was asked for; what is written must give the same adapter in the same reading.
        experts_order: the layout to write stacked experts' factors in; None for that of today's PEFT.
        shapes: key -> shape that the file had, where the writer would choose another of as many elements.
    """

    config: dict[str, Any] = {}
    targets: str = ""
    prefix: str = PREFIX
    compat: str | None = None
    experts_order: str | None = None
    keys: dict[str, str] = {}
    shapes: dict[str, list[Size]] = {}


def hints_of(adapter: Adapter) -> Hints:
    """The leftovers of an adapter that was read from a PEFT file; empty ones for any other.

    Raises:
        Malformed: they are damaged.
    """
    return leftovers(adapter, FORMAT, Hints)


def fingerprint(targets: Iterable[Target]) -> str:
    """sha256 over the targets' paths and rows."""
    return hashlib.sha256("\n".join(sorted(map(str, targets))).encode()).hexdigest()
