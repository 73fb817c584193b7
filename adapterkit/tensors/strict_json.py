"""JSON out of untrusted files: what two readers could understand differently is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_CONTAINERS = 1 << 22
"""Objects and lists of a document. A header has three of them for a tensor: room for 1.4 million tensors."""

MAX_VALUES = 1 << 24
_UNCHECKED = 4 << 20
"""Bytes of a document whose values are not counted: whatever it says, it takes less than 200 MB."""


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON; a key twice in one object; NaN, an infinity or a number too large for a float; half of a
            surrogate pair; too many values (`check_size`).
        RecursionError: nested too deeply.
    """
    check_size(text.encode("utf-8", "surrogatepass") if len(text) > _UNCHECKED else b"")
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def check_size(data: bytes) -> None:
    """Check that a JSON document does not describe more values than a real one, before they are made.

    Three bytes of text (`{},`) become an object of 64 bytes or more: 93 MB of them took 5 GB.

    Raises:
        ValueError: it does.
    """
    if len(data) <= _UNCHECKED:
        return
    bare = re.sub(rb'"(?:[^"\\]|\\.)*+"', b"", data, flags=re.DOTALL)
    if bare.count(b"{") + bare.count(b"[") > MAX_CONTAINERS or bare.count(b",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_CONTAINERS:,} objects and lists, or {MAX_VALUES:,} values")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"key {name!r} twice")
        fields[name] = value
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value
