"""Describe module names as dotted patterns with `#` for numbers, and restore the dots of flattened names.

kohya and LyCORIS write every dot as an underscore. Only a list of the existing names can undo this flattening.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")
"""Matches a number between two dots or underscores, but not the 1 of `attn1`."""


@dataclass(frozen=True, slots=True)
class PatternNames:
    """The names of a family's modules in one naming; create instances with `names_of`."""

    patterns: frozenset[str]
    by_dots: dict[str, tuple[str, ...]] = field(repr=False)
    by_underscores: dict[str, tuple[str, ...]] = field(repr=False)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.patterns_of(name))

    def patterns_of(self, name: str) -> list[str]:
        """List the patterns that fit a dotted name."""
        wanted = shape(name)
        candidates = self.by_dots.get(wanted, ())
        # A pattern without literal numbers fits every name of the same shape; others need a comparison of the numbers.
        return [each for each in candidates if each == wanted or fill(each, numbers(each, name)) == name]

    @property
    def literal(self) -> set[str]:
        """Return the literal numbers in the patterns, such as the 0 of `to_out.0`."""
        return {number for pattern in self.patterns for number in _NUMBER.findall(pattern)}

    def unflattened(self, flat: str) -> list[str]:
        """List the dotted names that equal `flat` if dots are written as underscores; there may be several."""
        found: dict[str, None] = {}
        for pattern in self.by_underscores.get(shape(flat), ()):
            name = fill(pattern, numbers(pattern.replace(".", "_"), flat))
            if flatten(name) == flat:
                found[name] = None
        return list(found)


def names_of(patterns: Iterable[str]) -> PatternNames:
    """Build a `PatternNames` from patterns."""
    dots: dict[str, list[str]] = {}
    underscores: dict[str, list[str]] = {}
    kept = dict.fromkeys(patterns)
    for pattern in kept:
        dots.setdefault(_NUMBER.sub("#", pattern), []).append(pattern)
        underscores.setdefault(_NUMBER.sub("#", flatten(pattern)), []).append(pattern)
    return PatternNames(
        frozenset(kept), {k: tuple(v) for k, v in dots.items()}, {k: tuple(v) for k, v in underscores.items()}
    )


@lru_cache(maxsize=1 << 16)
def shape(name: str) -> str:
    """Replace numbers in a name with `#`; cached, because the same names are looked up in every family and naming."""
    return _NUMBER.sub("#", name)


def alike(name: str, literal: Collection[str]) -> str:
    """Replace the numbers in a name with `#`, except those in `literal`.

    Names with equal results fit the same patterns.

    Args:
        name: the name, dotted or flattened.
        literal: the literal numbers in the patterns.
    """
    return _NUMBER.sub(lambda found: found[0] if found[0] in literal else "#", name)


def flatten(name: str) -> str:
    """Return a dotted name with underscores for dots."""
    return name.replace(".", "_")


def numbers(pattern: str, name: str) -> list[str]:
    """Return the numbers in `name` at the positions of `#` in `pattern`. Elsewhere, the two must be equal."""
    words, found = re.split(r"[._]", pattern), re.split(r"[._]", name)
    return [found[i] for i, word in enumerate(words) if word == "#" and i < len(found)]


def fill(pattern: str, given: Iterable[str]) -> str:
    """Replace each `#` in a pattern with the next number."""
    values = iter(given)
    return re.sub("#", lambda _: next(values, "#"), pattern)
