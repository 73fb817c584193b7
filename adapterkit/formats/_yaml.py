"""YAML out of untrusted files: plain values of bounded size."""

from __future__ import annotations

from typing import Any

from ..errors import Malformed

LIMIT = 1 << 20


def load_yaml(data: bytes, where: str) -> dict[str, Any]:
    """A mapping with text for keys.

    Raises:
        Malformed: it is none, too large, or asks for more than plain values.
    """
    import yaml

    cure = "Fetch or write the file again"
    if len(data) > LIMIT:
        raise Malformed(f"more than {LIMIT} bytes of YAML", where=where, cure=cure)
    try:
        value = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Malformed(f"not plain YAML ({str(error).partition(chr(10))[0]})", where=where, cure=cure) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Malformed("no mapping of names", where=where, cure=cure)
    return value


def dump_yaml(value: dict[str, Any], read: str = "") -> bytes:
    """The same the other way, keys in their order; the text that was read, where it says the same."""
    import yaml

    if read and load_yaml(read.encode(), "what was read") == value:
        return read.encode()
    return bytes(yaml.safe_dump(value, sort_keys=False).encode())
