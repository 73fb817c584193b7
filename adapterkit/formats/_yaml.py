"""Read and write adapter configs in YAML, which are mappings with strings as keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import Malformed
from ..io import strict_yaml

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


LIMIT = strict_yaml.MAX_BYTES


def load_yaml(data: bytes, where: str) -> dict[str, JsonValue]:
    """Parse a mapping with strings as keys.

    Raises:
        Malformed: the data is not a mapping, is too large, or has YAML features other than plain values.
    """
    value = strict_yaml.load_yaml(data, where=where)
    if not isinstance(value, dict):
        raise Malformed(
            "the YAML is not a mapping with names as keys", where=where, cure="Fetch or write the file again"
        )
    return value


def dump_yaml(value: Mapping[str, object], read: str = "") -> bytes:
    """Return a mapping as YAML, with its keys in order.

    If the source text `read` has the same content, return `read`.
    """
    import yaml

    if read and load_yaml(read.encode(), "what was read") == value:
        return read.encode()
    return bytes(yaml.safe_dump(value, sort_keys=False).encode())
