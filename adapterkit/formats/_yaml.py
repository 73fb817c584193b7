"""Read and write the YAML of adapters' configs: mappings with text keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import Malformed
from ..io import strict_yaml

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


LIMIT = strict_yaml.MAX_BYTES


def load_yaml(data: bytes, where: str) -> dict[str, JsonValue]:
    """Parse a mapping with text for keys.

    Raises:
        Malformed: it is not a mapping, is too large, or has more than plain values.
    """
    value = strict_yaml.load_yaml(data, where=where)
    if not isinstance(value, dict):
        raise Malformed("not a mapping of names", where=where, cure="Fetch or write the file again")
    return value


def dump_yaml(value: dict[str, Any], read: str = "") -> bytes:
    """Write a mapping, keys in their order; returns `read`, the text that was read, if it still means the same."""
    import yaml

    if read and load_yaml(read.encode(), "what was read") == value:
        return read.encode()
    return bytes(yaml.safe_dump(value, sort_keys=False).encode())
