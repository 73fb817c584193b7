"""Read SPDX licence expressions: `MIT OR Apache-2.0`, `(GPL-3.0 OR MIT) AND CC-BY-4.0`, `GPL-2.0 WITH exception`.

The grammar is that of SPDX 3.0, annex B: AND binds closer than OR, operators are read in both cases.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

IDENTIFIER = r"[A-Za-z0-9.+-]{1,64}"
_TOKEN = re.compile(rf"\s*([()]|{IDENTIFIER}(?=[\s()]|$))")
_MOST = 64
"""The largest number of alternatives, and of words, of an expression."""

Alternatives = tuple[tuple[str, ...], ...]
"""The sets of licences among which one may choose."""


@cache
def alternatives(text: str) -> Alternatives | None:
    """Return the sets of licences of an expression, in lower case; None if it is not an expression.

    A licence with an exception is one licence, `gpl-2.0 with classpath-exception-2.0`.

    Example:
        >>> alternatives("MIT AND (GPL-3.0 OR Apache-2.0)")
        (('mit', 'gpl-3.0'), ('mit', 'apache-2.0'))
    """
    words = _words(text)
    if words is None:
        return None
    try:
        found = _any(words)
    except (IndexError, ValueError):
        return None
    return None if words else found


def _words(text: str) -> list[str] | None:
    """Return the words of an expression, the last one first; None if there are other characters."""
    words: list[str] = []
    at = 0
    while text[at:].strip():
        token = _TOKEN.match(text, at)
        if token is None or len(words) >= _MOST:
            return None
        words.append(token[1].lower())
        at = token.end()
    return words[::-1]


def _any(words: list[str]) -> Alternatives:
    found = _every(words)
    while words and words[-1] == "or":
        words.pop()
        found += _every(words)
    return _bounded(found)


def _every(words: list[str]) -> Alternatives:
    found = _one(words)
    while words and words[-1] == "and":
        words.pop()
        found = _bounded(tuple(tuple(dict.fromkeys(a + b)) for a, b in product(found, _one(words))))
    return found


def _one(words: list[str]) -> Alternatives:
    word = words.pop()
    if word == "(":
        found = _any(words)
        if words.pop() != ")":
            raise ValueError("an open parenthesis")
        return found
    if word in (")", "and", "or", "with"):
        raise ValueError("an operator without a licence")
    if words and words[-1] == "with":
        words.pop()
        exception = words.pop()
        if exception in ("(", ")", "and", "or", "with"):
            raise ValueError("no exception after with")
        word = f"{word} with {exception}"
    return ((word,),)


def _bounded(found: Alternatives) -> Alternatives:
    if len(found) > _MOST:
        raise ValueError("too many alternatives")
    return tuple(dict.fromkeys(found))
