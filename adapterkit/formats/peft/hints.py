"""Record details of a PEFT file that an adapter's fields cannot store, so that the same file can be written again."""

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


class PeftHints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The leftovers of a PEFT file.

    Attributes:
        config: the source config.
        targets: a fingerprint of the source's targets. If it still matches, the lists of modules in the config are
            correct.
        prefix: the prefix of all keys.
        compat: the caller's `compat`. If the written file is read with this `compat`, it must yield the same adapter.
        experts_order: the layout in which stacked experts are written; None for the layout of current PEFT.
        keys: a map from the key that the writer would choose to the different key in the file.
        shapes: the shape of a tensor in the file, by key, if the writer would choose another shape for the same
            elements.
    """

    config: dict[str, Any] = {}
    targets: str = ""
    prefix: str = PREFIX
    compat: str | None = None
    experts_order: str | None = None
    keys: dict[str, str] = {}
    shapes: dict[str, list[Size]] = {}


def hints_of(adapter: Adapter) -> PeftHints:
    """Return the leftovers of an adapter that was read from PEFT's format; empty leftovers for any other adapter.

    Raises:
        Malformed: the leftovers are damaged.
    """
    return leftovers(adapter, FORMAT, PeftHints)


def fingerprint(targets: Iterable[Target]) -> str:
    """Return the sha256 of the targets' paths and rows."""
    return hashlib.sha256("\n".join(sorted(map(str, targets))).encode()).hexdigest()
