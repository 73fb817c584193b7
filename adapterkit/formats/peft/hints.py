"""Record facts of a PEFT file for which an adapter has no fields, so that the same file can be written again."""

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
        config: the config that was read.
        targets: a fingerprint of the targets that were read; while it matches, the config's module lists are valid.
        prefix: the prefix of all keys.
        compat: the `compat` that the caller selected; read with this `compat`, the written file must yield the adapter.
        experts_order: the layout of stacked experts' factors to write; None for the current PEFT's layout.
        keys: a map from the key that the writer would choose to the key in the file, for keys that differ.
        shapes: a tensor's shape in the file by key, if the writer would choose another shape for the same elements.
    """

    config: dict[str, Any] = {}
    targets: str = ""
    prefix: str = PREFIX
    compat: str | None = None
    experts_order: str | None = None
    keys: dict[str, str] = {}
    shapes: dict[str, list[Size]] = {}


def hints_of(adapter: Adapter) -> PeftHints:
    """Return the leftovers of an adapter that was read from a PEFT file; empty leftovers for any other adapter.

    Raises:
        Malformed: the leftovers are damaged.
    """
    return leftovers(adapter, FORMAT, PeftHints)


def fingerprint(targets: Iterable[Target]) -> str:
    """Return the sha256 of the targets' paths and rows."""
    return hashlib.sha256("\n".join(sorted(map(str, targets))).encode()).hexdigest()
