r"""Regular expressions from files, matched in bounded time.

Python's `re` tries one way after another, and a short pattern such as `((\w|\.)+)+Q` can have more ways than can be
tried in a lifetime. Here a pattern that `re` is sure to finish is left to `re`; any other is run as an automaton that
follows all ways at once, character by character, after `re`'s own parser. Whether there is a match is the same question
for both, and that is all that PEFT asks: groups, and which of two matches is taken, do not count.

RE2 would be faster, but it reads another language (no `(?=`, other classes of characters), so that a file would mean
something else here than in PEFT, and it would be one more package with compiled code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

SURE = 2_000_000
"""Steps that `re` may take at most for one name: some milliseconds."""

PATIENT = 200_000_000
"""The same where no automaton can be made of the pattern: about a second."""

MAX_STATES = 4_000
MAX_VISITS = 2_000_000
"""States that are looked at for one pattern, of all names together; what was found once is remembered."""

MAX_REMEMBERED = 20_000

_NEVER = float("inf")


class TooSlow(Exception):
    """A pattern for which no bound can be kept."""


def fits(pattern: str, name: str, kind: str) -> bool:
    """Whether a pattern fits a name as `re.match`, `re.fullmatch` or `re.search` says.

    Args:
        pattern: a valid regular expression.
        name: the text.
        kind: `match`, `fullmatch` or `search`.

    Raises:
        TooSlow: it might take longer than anybody would wait.
        re.error: the pattern is not a regular expression.
    """
    compiled = _compiled(pattern)
    # Steps for a name of the next power of two characters, so that few lengths are computed.
    steps = _steps(pattern, 1 << max(len(name), 1).bit_length())
    if steps > SURE:
        automaton = _automaton(pattern)
        if automaton is not None:
            return automaton.fits(name, kind)
        if steps > PATIENT:
            raise TooSlow
    return getattr(compiled, kind)(name) is not None


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@lru_cache(maxsize=1 << 12)
def _parsed(pattern: str) -> Any:
    # `re` has no public way to its parser; the module is the same from Python 3.11 on.
    return re._parser.parse(pattern)  # type: ignore[attr-defined]


@lru_cache(maxsize=1 << 14)
def _steps(pattern: str, length: int) -> float:
    """An upper bound of the steps that backtracking takes."""
    try:
        return _ways(_parsed(pattern), length) * length
    except RecursionError:
        return _NEVER


def _ways(items: Iterable[Any], length: int) -> float:
    """An upper bound of the ways in which a sequence can fit from one place on."""
    ways = 1.0
    for code, value in items:
        ways *= _ways_of(str(code), value, length)
    return ways


def _ways_of(code: str, value: Any, length: int) -> float:
    if code == "BRANCH":
        return sum(_ways(each, length) for each in value[1])
    if code == "SUBPATTERN":
        return _ways(value[3], length)
    if code in ("ASSERT", "ASSERT_NOT"):
        return _ways(value[1], length)
    if code == "ATOMIC_GROUP":
        return _ways(value, length)
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = value
        inner = _ways(body, length)
        if most <= 1:
            return 1 + inner
        # The ways of a body that can itself fit in several ways multiply with each repetition.
        narrowest, widest = body.getwidth()
        if inner > 1 or narrowest != widest or not narrowest:
            return inner if least == most == 1 else _NEVER
        return float(max(1, min(int(most), length) - least + 1))
    if code == "GROUPREF_EXISTS":
        return _NEVER
    return 1.0


class _Unsupported(Exception):
    """Something that an automaton cannot follow: a reference to a group, or what looks ahead."""


@lru_cache(maxsize=1 << 10)
def _automaton(pattern: str) -> Automaton | None:
    try:
        return Automaton(pattern)
    except (_Unsupported, RecursionError):
        return None


class Automaton:
    """All ways of a pattern at once (K. Thompson 1968), with the sets of states that were met remembered.

    A state is `("char", test, next)`, `("split", nexts)`, `("at", test, next)` or `("end",)`.
    """

    def __init__(self, pattern: str) -> None:
        self.states: list[tuple[Any, ...]] = [("end",)]
        parsed = _parsed(pattern)
        self.start = self._sequence(parsed, 0, parsed.state.flags)
        self.visits = 0
        self.steps: dict[Any, frozenset[int]] = {}
        self.reached: dict[Any, frozenset[int]] = {}

    def fits(self, name: str, kind: str) -> bool:
        """Whether the pattern fits; see `fits`.

        Raises:
            TooSlow: too many states were looked at.
        """
        now: frozenset[int] = frozenset([self.start])
        for at in range(len(name) + 1):
            if kind == "search" and at:
                now |= {self.start}
            now = self._closure(now, _place(name, at))
            if 0 in now and (kind != "fullmatch" or at == len(name)):
                return True
            if at < len(name):
                now = self._step(now, name[at])
                if not now and kind != "search":
                    return False
        return False

    def _step(self, states: frozenset[int], char: str) -> frozenset[int]:
        key = states, char
        if key not in self.steps:
            found = set()
            for number in states:
                state = self.states[number]
                if state[0] == "char" and state[1](char):
                    found.add(state[2])
            self._remember(self.steps, key, frozenset(found), len(states))
        return self.steps[key]

    def _closure(self, states: frozenset[int], place: _Place) -> frozenset[int]:
        """The states that are reached without a character."""
        key = states, place
        if key not in self.reached:
            found, open_ = set(states), list(states)
            while open_:
                state = self.states[open_.pop()]
                if state[0] == "split":
                    following = state[1]
                else:
                    following = (state[2],) if state[0] == "at" and state[1](place) else ()
                fresh = [number for number in following if number not in found]
                found.update(fresh)
                open_.extend(fresh)
            self._remember(self.reached, key, frozenset(found), len(found))
        return self.reached[key]

    def _remember(self, known: dict[Any, frozenset[int]], key: Any, value: frozenset[int], visits: int) -> None:
        self.visits += visits + 1
        if self.visits > MAX_VISITS:
            raise TooSlow
        if len(known) >= MAX_REMEMBERED:
            known.clear()
        known[key] = value

    def _add(self, *state: Any) -> int:
        if len(self.states) >= MAX_STATES:
            raise TooSlow
        self.states.append(state)
        return len(self.states) - 1

    def _sequence(self, items: Any, following: int, flags: int) -> int:
        """The state at which a sequence begins, that goes on at `following`."""
        for code, value in reversed(list(items)):
            following = self._item(str(code), value, following, flags)
        return following

    def _item(self, code: str, value: Any, following: int, flags: int) -> int:
        if code in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._add("char", _test(code, value, flags), following)
        if code == "AT":
            return self._add("at", _position(str(value), flags), following)
        if code == "BRANCH":
            return self._add("split", tuple(self._sequence(each, following, flags) for each in value[1]))
        if code == "SUBPATTERN":
            _, more, less, body = value
            return self._sequence(body, following, (flags | more) & ~less)
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = value
            return self._repeated(least, most, body, following, flags)
        raise _Unsupported

    def _repeated(self, least: int, most: Any, body: Any, following: int, flags: int) -> int:
        if str(most) == "MAXREPEAT":
            start = self._add("split", ())
            self.states[start] = ("split", (self._sequence(body, start, flags), following))
        else:
            start = following
            for _ in range(int(most) - least):
                start = self._add("split", (self._sequence(body, start, flags), following))
        for _ in range(least):
            start = self._sequence(body, start, flags)
        return start


_Place = tuple[bool, bool, bool, str, str]
"""A place between characters: whether it is the start, the end, before a last newline; the characters beside it."""


def _place(name: str, at: int) -> _Place:
    last = at == len(name) - 1 and name[at] == "\n"
    return at == 0, at == len(name), last, name[at - 1 : at] if at else "", name[at : at + 1]


def _position(code: str, flags: int) -> Callable[[_Place], bool]:
    if flags & re.MULTILINE:
        raise _Unsupported
    if code in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return lambda place: place[0]
    if code == "AT_END":
        return lambda place: place[1] or place[2]
    if code == "AT_END_STRING":
        return lambda place: place[1]
    own = re.compile(r"\b" if code == "AT_BOUNDARY" else r"\B", flags & re.ASCII)
    return lambda place: own.match(place[3] + place[4], len(place[3])) is not None


def _test(code: str, value: Any, flags: int) -> Callable[[str], bool]:
    if flags & (re.IGNORECASE | re.LOCALE):
        raise _Unsupported
    if code == "LITERAL":
        return lambda char: ord(char) == value
    if code == "NOT_LITERAL":
        return lambda char: ord(char) != value
    if code == "ANY":
        return (lambda _: True) if flags & re.DOTALL else (lambda char: char != "\n")
    tests = [_member(str(kind), what, flags) for kind, what in value if str(kind) != "NEGATE"]
    negated = len(tests) != len(value)
    return lambda char: any(test(char) for test in tests) != negated


def _member(kind: str, value: Any, flags: int) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda char: ord(char) == value
    if kind == "RANGE":
        return lambda char: value[0] <= ord(char) <= value[1]
    if kind == "CATEGORY":
        return _category(str(value), flags)
    raise _Unsupported


def _category(name: str, flags: int) -> Callable[[str], bool]:
    letters = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}
    letter = letters[name.rpartition("_")[2]]
    own = re.compile(f"\\{letter.upper() if '_NOT_' in name else letter}", flags & re.ASCII)
    return lambda char: own.match(char) is not None
