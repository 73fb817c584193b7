"""Parse JSON from untrusted files. Refuse documents that different parsers could interpret in different ways."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    JsonValue = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
    """A JSON value; a tuple counts as a list."""

MAX_QUOTES = 1 << 23
"""The largest number of quotation marks in a document.

A safetensors header has ten quotation marks per tensor. So the limit allows 800,000 tensors, 8 times as many as the
largest known model has.
"""

MAX_CONTAINERS = 1 << 21
"""The largest number of objects and lists in a document. In a safetensors header, each tensor has one object and two
lists."""

MAX_VALUES = 1 << 24
MAX_DEPTH = 100
"""The deepest nesting of objects and lists; real documents have about ten levels."""

_OF_A_TABLE = b"{}[]:,0123456789 \t\r\n"
_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def load_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON; an object repeats a key; the text contains a NaN, an infinity, a number too
            large for a float, or half of a surrogate pair; or it has too many values or levels (`check_size`).
        RecursionError: the nesting exceeds the limit of Python's JSON parser.
    """
    check_size(text.encode("utf-8", "surrogatepass"))
    return _load(text, _unique)


def load_table(text: str) -> tuple[Any, bool]:
    """Return the value of a JSON text that is one large object of small objects, such as a tensor header.

    This returns the same value as `load_json` in a third of the time. The characters outside of strings show whether
    all values are strings or non-negative integers. If so, the values need no individual checks.

    Args:
        text: the JSON text.

    Returns:
        The value, and whether it consists only of objects, lists, strings and non-negative integers.

    Raises:
        ValueError, RecursionError: as for `load_json`.
    """
    bare = check_size(text.encode("utf-8", "surrogatepass"))
    regular = not bare.translate(None, _OF_A_TABLE)
    value = _load(text, None if regular else _unique)
    if not isinstance(value, dict):
        return value, False
    # Compare the number of colons with the number of parsed keys. They differ if a key is repeated, because the parser
    # keeps only one of two equal keys.
    fields = len(value) + sum(len(inner) for inner in value.values() if isinstance(inner, dict))
    if regular and bare.count(b":") != fields:
        # A key occurs twice, or an object is at the third level or deeper. Parse the text again, with all checks.
        return _load(text, _unique), False
    return value, regular


def _load(text: str, hook: Callable[[list[tuple[str, JsonValue]]], dict[str, JsonValue]] | None) -> Any:
    value = json.loads(text, object_pairs_hook=hook, parse_constant=_refuse, parse_float=_finite)
    # Raise an error for a lone surrogate. Only an escape can produce one, so most documents skip this check.
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def check_size(data: bytes) -> bytes:
    """Check a JSON document before it is parsed. Refuse more values or levels than real documents have.

    The number of values is limited because three bytes of text (`{},`) become an object of 64 bytes or more; 93 MB of
    such text took 5 GB. The depth is limited because code that walks through the values recurses at each level.

    Returns:
        The document without its strings.

    Raises:
        ValueError: the document has too many values or levels.
    """
    if data.count(b'"') > MAX_QUOTES:
        raise ValueError(f"there are more than {MAX_QUOTES:,} quotation marks")
    # The pattern lets an unterminated string extend to the end of the text. Otherwise, the search would run to the
    # end of the text again from each quotation mark, which takes quadratic time.
    bare = re.sub(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', b"", data, flags=re.DOTALL)
    if bare.count(b"{") + bare.count(b"[") > MAX_CONTAINERS or bare.count(b",") > MAX_VALUES:
        raise ValueError(f"there are more than {MAX_CONTAINERS:,} objects and lists, or {MAX_VALUES:,} values")
    # Replace `{}` by `[]`, so that each iteration removes one level of both kinds. The parser checks later whether an
    # opening bracket and its closing bracket are of the same kind.
    brackets = bare.translate(_ONE_KIND, _BUT_BRACKETS)
    for _ in range(MAX_DEPTH):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    # The loop has removed all balanced brackets, unless they are nested too deeply. If the remaining brackets are
    # unbalanced, the parser will refuse them.
    if len(brackets) > MAX_DEPTH or b"[]" in brackets:
        raise ValueError(f"objects and lists are nested more than {MAX_DEPTH} levels deep")
    return bare


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
