"""Record the facts of a PEFT file that an adapter has no fields for, so that it can be written again as it was."""

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
    """The leftovers.

    Attributes:
        config: the config as it was read.
        targets: fingerprint of the targets that were read; if it is unchanged, the config's module lists still hold.
        prefix: the prefix of all keys.
        keys: key that the writer would choose -> key in the file, if the updates do not determine it.
        compat: the reading that the caller selected; the written file must give the same adapter in the same reading.
        experts_order: the layout of stacked experts' factors to write; None for the layout of today's PEFT.
        shapes: key -> shape in the file, if the writer would choose another with as many elements.
    """

    config: dict[str, Any] = {}
    targets: str = ""
    prefix: str = PREFIX
    compat: str | None = None
    experts_order: str | None = None
    keys: dict[str, str] = {}
    shapes: dict[str, list[Size]] = {}


def hints_of(adapter: Adapter) -> PeftHints:
    """Return the leftovers of an adapter that was read from a PEFT file; empty ones for any other.

    Raises:
        Malformed: the leftovers are damaged.
    """
    return leftovers(adapter, FORMAT, PeftHints)


def fingerprint(targets: Iterable[Target]) -> str:
    """Return the sha256 of the targets' paths and rows."""
    return hashlib.sha256("\n".join(sorted(map(str, targets))).encode()).hexdigest()
