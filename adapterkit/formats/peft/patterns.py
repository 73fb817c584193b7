"""Names and the regular expressions that a config matches them with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

from ...errors import Malformed, Unsupported
from .automaton import TooSlow, fits

T = TypeVar("T")


def first_match(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that fits `name`, whole or behind a dot, else of the one that is `name` itself."""
    if not patterns:
        return default
    known = _INDEXES.get(id(patterns))
    if known is None or known.patterns is not patterns or known.size != len(patterns):
        if len(_INDEXES) >= _MOST_INDEXES:
            _INDEXES.clear()
        known = _INDEXES[id(patterns)] = _Index(patterns)
    position = known.first(name)
    return patterns.get(name, default) if position is None else known.values[position]


class _Index(Generic[T]):
    """Patterns sorted by what can be looked up: PEFT's EVA, and `exactly`, write one for each of 10^4 modules.

    Args:
        patterns: pattern -> value, in the order in which they are tried.
    """

    def __init__(self, patterns: Mapping[str, T]) -> None:
        self.patterns, self.size, self.values = patterns, len(patterns), list(patterns.values())
        self._exact: dict[str, int] = {}
        self._plain: dict[str, dict[tuple[int, tuple[int, ...]], dict[str, int]]] = {}
        self._others: list[tuple[int, str]] = []
        for position, pattern in enumerate(patterns):
            literal = _literal(pattern)
            if literal:
                self._exact.setdefault(literal, position)
            elif _PLAIN.fullmatch(pattern):
                # A plain name but for its dots, each of which fits any character. Those with dots at the same places
                # are compared by one look-up; names of modules have a few dozen such forms.
                dots = tuple(at for at, char in enumerate(pattern) if char == ".")
                forms = self._plain.setdefault(pattern.rpartition(".")[2], {})
                forms.setdefault((len(pattern), dots), {}).setdefault(pattern, position)
            else:
                self._others.append((position, pattern))

    def first(self, name: str) -> int | None:
        """The position of the first pattern that fits a name, whole or behind a dot."""
        if "\n" in name:  # Neither a dot nor `$` treats it as other characters.
            tried = ((at, _literal(p), p) for at, p in enumerate(self.patterns))
            return next((at for at, word, p in tried if (word == name if word else _behind_a_dot(p, name))), None)
        found = [self._exact[name]] if name in self._exact else []
        for tail, forms in self._plain.items():
            if name.endswith(tail):
                found += [at for form, known in forms.items() if (at := _among(name, form, known)) is not None]
        best = min(found, default=len(self.values))
        others = (at for at, pattern in self._others if at < best and _behind_a_dot(pattern, name))
        best = min(next(others, best), best)
        return None if best == len(self.values) else best


def _behind_a_dot(pattern: str, name: str) -> bool:
    return matches(rf"(.*\.)?({pattern})$", name)


def _among(name: str, form: tuple[int, tuple[int, ...]], known: Mapping[str, int]) -> int | None:
    """The position of the one of these patterns that fits the end of a name: of its length, with these dots."""
    length, dots = form
    start = len(name) - length
    if start < 0 or (start and name[start - 1] != "."):
        return None
    end = name[start:]
    if any(end[dot] != "." for dot in dots):
        end = "".join("." if at in dots else char for at, char in enumerate(end))
    return known.get(end)


_INDEXES: dict[int, _Index[Any]] = {}
_MOST_INDEXES = 8
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
"""Patterns in which all characters but the dots stand for themselves."""


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
