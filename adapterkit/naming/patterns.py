"""Describe module names as dotted patterns, with `#` for a number, and find what a flattened name can mean.

kohya and LyCORIS write every dot as an underscore; only a list of the existing names can undo that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")
"""A number that stands between separators; the 1 of `attn1` does not."""


@dataclass(frozen=True, slots=True)
class PatternNames:
    """The names of one family of models in one naming; made by `names_of`."""

    patterns: frozenset[str]
    by_dots: dict[str, tuple[str, ...]] = field(repr=False)
    by_underscores: dict[str, tuple[str, ...]] = field(repr=False)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.patterns_of(name))

    def patterns_of(self, name: str) -> list[str]:
        """List the patterns that a dotted name fits."""
        wanted = shape(name)
        candidates = self.by_dots.get(wanted, ())
        # A pattern without numbers of its own has every name of its shape.
        return [each for each in candidates if each == wanted or fill(each, numbers(each, name)) == name]

    @property
    def literal(self) -> set[str]:
        """The numbers that are in the patterns themselves, such as the 0 of `to_out.0`."""
        return {number for pattern in self.patterns for number in _NUMBER.findall(pattern)}

    def unflattened(self, flat: str) -> list[str]:
        """List the dotted names that `flat`, with underscores for dots, can stand for; none, one or several."""
        found: dict[str, None] = {}
        for pattern in self.by_underscores.get(shape(flat), ()):
            name = fill(pattern, numbers(pattern.replace(".", "_"), flat))
            if flatten(name) == flat:
                found[name] = None
        return list(found)


def names_of(patterns: Iterable[str]) -> PatternNames:
    """Return the names that patterns describe."""
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
    """Replace numbers in a name by `#`; cached, because every family and naming is asked for the same names."""
    return _NUMBER.sub("#", name)


def alike(name: str, literal: Collection[str]) -> str:
    """Replace the numbers in a name by `#`, except these: names that come out the same fit the same patterns.

    Args:
        name: the name, dotted or flattened.
        literal: the numbers that patterns have themselves.
    """
    return _NUMBER.sub(lambda found: found[0] if found[0] in literal else "#", name)


def flatten(name: str) -> str:
    """Return a dotted name with underscores for dots."""
    return name.replace(".", "_")


def numbers(pattern: str, name: str) -> list[str]:
    """Return the numbers in `name` at the places of `#` in `pattern`; the two must be equal otherwise."""
    words, found = re.split(r"[._]", pattern), re.split(r"[._]", name)
    return [found[i] for i, word in enumerate(words) if word == "#" and i < len(found)]


def fill(pattern: str, given: Iterable[str]) -> str:
    """Fill the `#` of a pattern with numbers, in order."""
    values = iter(given)
    return re.sub("#", lambda _: next(values, "#"), pattern)
