"""YAML of adapters' configs: a mapping of names, read and written."""

from __future__ import annotations

from typing import Any

from ..errors import Malformed
from ..io import strict_yaml

LIMIT = strict_yaml.MAX_BYTES


def load_yaml(data: bytes, where: str) -> dict[str, Any]:
    """A mapping with text for keys.

    Raises:
        Malformed: it is not one, is too large, or asks for more than plain values.
    """
    value = strict_yaml.load_yaml(data, where=where)
    if not isinstance(value, dict):
        raise Malformed("not a mapping of names", where=where, cure="Fetch or write the file again")
    return value


def dump_yaml(value: dict[str, Any], read: str = "") -> bytes:
    """The same the other way, keys in their order; the text that was read, where it says the same."""
    import yaml

    if read and load_yaml(read.encode(), "what was read") == value:
        return read.encode()
    return bytes(yaml.safe_dump(value, sort_keys=False).encode())
