"""What a folder of AdapterHub's held that the model has no home for: enough to write the same folder again."""

from __future__ import annotations

from typing import Any

import msgspec

from ...core.adapter import Adapter
from .._leftovers import leftovers

FORMAT = "adapterhub"
HEAD = "head/"
"""What the names of a prediction head's tensors begin with among the leftovers."""


class Hints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The leftovers.

    Attributes:
        config: the whole config as it was read.
        file: name of the file of tensors.
        root: the path of the base model in its keys, where something tells.
        keys: key that the writer would choose -> key that the file had.
        compat: the reading that was asked for.
        interface: the plugin interface beside it.
        head: config of its prediction head.
        head_file: name of that head's file of tensors.
    """

    config: dict[str, Any] = {}
    file: str = ""
    root: str = ""
    keys: dict[str, str] = {}
    compat: str | None = None
    interface: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    head_file: str | None = None


def hints_of(adapter: Adapter) -> Hints:
    """The leftovers of an adapter that was read from such a folder; empty ones for any other.

    Raises:
        Malformed: they are damaged.
    """
    return leftovers(adapter, FORMAT, Hints)
