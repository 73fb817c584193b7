"""Names and the regular expressions that a config matches them with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

from ...errors import Malformed, Unsupported
from .automaton import TooSlow, fits

T = TypeVar("T")


def first_match(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that fits `name`, whole or behind a dot, else of the one that is `name` itself."""
    for pattern, value in patterns.items():
        literal = _literal(pattern)
        if literal == name if literal else matches(rf"(.*\.)?({pattern})$", name):
            return value
    return patterns.get(name, default)


def exactly(name: str) -> str:
    """The pattern that fits this name only: PEFT would let a plain one fit endings, and let a dot fit anything."""
    return f"^{re.escape(name)}$"


def matches(pattern: str, name: str, *, whole: bool = False) -> bool:
    """Whether a regular expression out of a config fits `name` from its start, or all of it.

    Raises:
        Malformed: it is not a regular expression.
        Unsupported: it could take hours.
    """
    return _fits(pattern, name, "fullmatch" if whole else "match")


def finds(pattern: str, name: str) -> bool:
    """Whether a regular expression out of a config fits anywhere in `name`.

    Raises:
        Malformed: it is not a regular expression.
        Unsupported: it could take hours.
    """
    literal = _literal(pattern)
    return literal == name if literal else _fits(pattern, name, "search")


def _fits(pattern: str, name: str, kind: str) -> bool:
    try:
        return fits(pattern, name, kind)
    except TooSlow:
        why = "a regular expression that could take hours to match"
        cure = "Write it without repetitions inside repetitions, or list the names of the modules"
        raise Unsupported(why, where=pattern[:80], cure=cure) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise Malformed(f"not a regular expression ({error})", where=pattern[:80], cure=_REWRITE) from None


@lru_cache(maxsize=1 << 14)
def _literal(pattern: str) -> str:
    """The only name that the pattern can fit, when it is one that `exactly` made; configs hold hundreds of them."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
    return name if pattern == exactly(name) else ""


_REWRITE = "Write the adapter again with PEFT"
