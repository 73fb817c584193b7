"""JSON out of untrusted files: what two readers could understand differently is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

MAX_QUOTES = 1 << 23
"""Quotation marks of a document. A tensor takes ten in a header: room for 800,000 of them, eight times the most."""

MAX_CONTAINERS = 1 << 21
"""Objects and lists of a document; a tensor takes three."""

MAX_VALUES = 1 << 24
MAX_DEPTH = 100
"""Objects and lists inside each other; real documents have about ten."""

_OF_A_TABLE = b"{}[]:,0123456789 \t\r\n"
_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON; a key twice in one object; NaN, an infinity or a number too large for a float; half of a
            surrogate pair; too many values, or nested too deeply (`check_size`).
        RecursionError: nested so deeply that Python's own reader gives up.
    """
    check_size(text.encode("utf-8", "surrogatepass"))
    return _load(text, _unique)


def load_table(text: str) -> tuple[Any, bool]:
    """The value of a JSON text that is one large object of objects of few fields each, as a header of tensors is.

    The same as `load_json`, in a third of the time: where the text is regular, which a look at it without its strings
    tells, the values need not be looked at one by one.

    Args:
        text: the JSON text.

    Returns:
        the value; whether all that is in it are objects, lists, texts, and whole numbers that are not negative.

    Raises:
        ValueError, RecursionError: as `load_json`.
    """
    bare = check_size(text.encode("utf-8", "surrogatepass"))
    regular = not bare.translate(None, _OF_A_TABLE)
    value = _load(text, None if regular else _unique)
    if not isinstance(value, dict):
        return value, False
    # Counted in what was read: an entry with a key twice and another one missing has as many colons as it should.
    fields = len(value) + sum(len(inner) for inner in value.values() if isinstance(inner, dict))
    if regular and bare.count(b":") != fields:
        # A key that came twice, or another object than one of the tables that this is for.
        return _load(text, _unique), False
    return value, regular


def _load(text: str, hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None) -> Any:
    value = json.loads(text, object_pairs_hook=hook, parse_constant=_refuse, parse_float=_finite)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def check_size(data: bytes) -> bytes:
    """Check that a JSON document has no more values than a real one, and no more inside each other, before it is read.

    Three bytes of text (`{},`) become an object of 64 bytes or more: 93 MB of them took 5 GB. Depth is limited because
    all that walks through the values calls itself once or more for each level.

    Returns:
        the document without its strings.

    Raises:
        ValueError: there are too many.
    """
    if data.count(b'"') > MAX_QUOTES:
        raise ValueError(f"more than {MAX_QUOTES:,} quotation marks")
    # A string that does not end goes on to the end: to look for its end from each of its quotes would be quadratic.
    bare = re.sub(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', b"", data, flags=re.DOTALL)
    if bare.count(b"{") + bare.count(b"[") > MAX_CONTAINERS or bare.count(b",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_CONTAINERS:,} objects and lists, or {MAX_VALUES:,} values")
    # Both kinds of brackets become one, so that a round removes one level; the parser refuses those that do not match.
    brackets = bare.translate(_ONE_KIND, _BUT_BRACKETS)
    for _ in range(MAX_DEPTH):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    if len(brackets) > MAX_DEPTH or b"[]" in brackets:
        raise ValueError(f"more than {MAX_DEPTH} objects and lists inside each other")
    return bare


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} twice")
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value
