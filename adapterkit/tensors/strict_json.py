"""JSON out of untrusted files: what two readers could understand differently is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON; a key twice in one object; NaN, an infinity or a number too large for a float; half of a
            surrogate pair.
        RecursionError: nested too deeply.
    """
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


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
