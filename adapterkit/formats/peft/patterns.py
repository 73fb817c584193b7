"""Match module names against the patterns in a config, and create patterns for a config.

Matching takes a bounded time, because a config may be hostile.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ...errors import SAVE_WITH_PEFT, Malformed, Unsupported
from ...naming.moves import WRAPPERS

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue


# Match module names against the regular expressions in a config, in bounded time: a config may be hostile.


SURE = 2_000_000
"""`re` is used only if it needs at most this many steps for a name. This number of steps takes a few milliseconds."""

PATIENT = 200_000_000
"""The limit that replaces `SURE` if `Automaton` does not support a pattern. This many steps take about a second."""

MAX_STATES = 4_000
MAX_VISITS = 2_000_000
"""The largest number of states that the automaton of one pattern may visit, for all names together."""

MAX_REMEMBERED = 20_000

_NEVER = float("inf")

_INSIDE = "base_model.model."
"""The prefix of names in a PEFT model. DistributedDataParallel and TRL's value heads add names before it."""


class TooSlow(Exception):
    """Raised if matching a pattern may take too long."""


def fits(pattern: str, name: str, kind: str) -> bool:
    """Whether a pattern fits a name, as `re.match`, `re.fullmatch` or `re.search` would decide.

    Args:
        pattern: a valid regular expression.
        name: the text to match.
        kind: the name of the function in `re`: `match`, `fullmatch` or `search`.

    Raises:
        TooSlow: matching may take too long.
        re.error: the pattern is not a regular expression.
    """
    compiled = _compiled(pattern)
    # Round the length up to a power of two, so that the cache of `_steps` needs only a few entries for each pattern.
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
    # `re` has no public parser. The private one has been `re._parser` since Python 3.11, the oldest supported version.
    return re._parser.parse(pattern)  # type: ignore[attr-defined]


@lru_cache(maxsize=1 << 14)
def _steps(pattern: str, length: int) -> float:
    """Return an upper bound for the number of steps that `re` needs with backtracking."""
    try:
        return _ways(_parsed(pattern), length) * length
    except RecursionError:
        return _NEVER


def _ways(items: Iterable[Any], length: int) -> float:
    """Return an upper bound for the number of ways in which the sequence `items` can match at one position."""
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
        # If the body can match in several ways, or can match texts of different lengths, the number of ways may grow
        # exponentially with the number of repetitions. Return infinity in these cases, and also if the body can match
        # only the empty text.
        narrowest, widest = body.getwidth()
        if inner > 1 or narrowest != widest or not narrowest:
            return inner if least == most == 1 else _NEVER
        return float(max(1, min(int(most), length) - least + 1))
    if code == "GROUPREF_EXISTS":
        return _NEVER
    return 1.0


class _Unsupported(Exception):
    """Raised if `Automaton` does not support a feature of a pattern, such as a look-ahead or a group reference."""


@lru_cache(maxsize=1 << 10)
def _automaton(pattern: str) -> Automaton | None:
    try:
        return Automaton(pattern)
    except (_Unsupported, RecursionError):
        return None


class Automaton:
    """Matches a pattern without backtracking: follows all its alternatives at the same time (K. Thompson 1968).

    A state is `("char", test, next)`, `("split", nexts)`, `("at", test, next)` or `("end",)`. The transitions between
    sets of states are cached, because many names lead to the same transitions.
    """

    def __init__(self, pattern: str) -> None:
        self.states: list[tuple[Any, ...]] = [("end",)]
        parsed = _parsed(pattern)
        self.start = self._sequence(parsed, 0, parsed.state.flags)
        self.visits = 0
        self.steps: dict[Any, frozenset[int]] = {}
        self.reached: dict[Any, frozenset[int]] = {}

    def fits(self, name: str, kind: str) -> bool:
        """Whether the pattern fits a name; see the function `fits`.

        Raises:
            TooSlow: too many states were visited.
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
            reached = set()
            for number in states:
                state = self.states[number]
                if state[0] == "char" and state[1](char):
                    reached.add(state[2])
            self._remember(self.steps, key, frozenset(reached), len(states))
        return self.steps[key]

    def _closure(self, states: frozenset[int], place: _Place) -> frozenset[int]:
        """Return all states that can be reached from `states` without reading a character."""
        key = states, place
        if key not in self.reached:
            reached, open_ = set(states), list(states)
            while open_:
                state = self.states[open_.pop()]
                if state[0] == "split":
                    following = state[1]
                else:
                    following = (state[2],) if state[0] == "at" and state[1](place) else ()
                fresh = [number for number in following if number not in reached]
                reached.update(fresh)
                open_.extend(fresh)
            self._remember(self.reached, key, frozenset(reached), len(reached))
        return self.reached[key]

    def _remember(self, known: dict[T, frozenset[int]], key: T, value: frozenset[int], visits: int) -> None:
        self.visits += visits + 1
        if self.visits > MAX_VISITS:
            raise TooSlow
        if len(known) >= MAX_REMEMBERED:
            known.clear()
        known[key] = value

    def _add(self, *state: object) -> int:
        if len(self.states) >= MAX_STATES:
            raise TooSlow
        self.states.append(state)
        return len(self.states) - 1

    def _sequence(self, items: Any, following: int, flags: int) -> int:
        """Create the states for a sequence of items, and return the index of the first state.

        After the last item, matching continues at the state with the index `following`.
        """
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
"""A position in a text: (at the start?, at the end?, before a final newline?, character before, character after)."""


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
    pattern = re.compile(r"\b" if code == "AT_BOUNDARY" else r"\B", flags & re.ASCII)
    return lambda place: pattern.match(place[3] + place[4], len(place[3])) is not None


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
    pattern = re.compile(f"\\{letter.upper() if '_NOT_' in name else letter}", flags & re.ASCII)
    return lambda char: pattern.match(char) is not None


T = TypeVar("T")


def first_match(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first pattern that matches all of `name`, or all of the text after a dot in `name`.

    If no pattern matches, return the value of the pattern that equals `name`. If there is no such pattern, return
    `default`.

    Wrappers such as FSDP and torch.compile insert names such as `_orig_mod` into the keys of a model. PEFT applies the
    patterns before the model is wrapped, so the patterns are also compared with `name` without the inserted names.
    """
    if not patterns:
        return default
    known = _INDEXES.get(id(patterns))
    if known is None or known.patterns is not patterns or known.size != len(patterns):
        if len(_INDEXES) >= _MOST_INDEXES:
            _INDEXES.clear()
        known = _INDEXES[id(patterns)] = _Index(patterns)
    # Also try the unchanged name, because patterns that adapterkit wrote contain the names that wrappers insert.
    tried = {name, unwrapped(name)}
    if "module." in name:
        # DistributedDataParallel inserts `module`, but the path of a model's own module may contain `module`, too. Try
        # the name with and without `module`, because a pattern that starts with `^` matches only one of the two.
        tried.add(".".join(word for word in unwrapped(name).split(".") if word != "module"))
    positions = [position for each in tried if (position := known.first(each)) is not None]
    return known.values[min(positions)] if positions else patterns.get(name, default)


def unwrapped(name: str) -> str:
    """Return a module's path in the base model, without PEFT's prefix and without the names that wrappers insert."""
    name = name.rpartition(_INSIDE)[2]
    if not any(word in name for word in WRAPPERS):
        return name
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


class _Index(Generic[T]):
    """An index that finds the first pattern that fits a name, without trying all patterns.

    A config may have up to 10^4 patterns if adapterkit wrote it, or if PEFT initialized the adapter with EVA.

    Args:
        patterns: a map from patterns to values, in the order in which the patterns are tried.
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
                # The pattern is a plain name, except that each dot matches any character. Group such patterns by their
                # length and the positions of their dots. One look-up then compares a name with all patterns of a group.
                # A config has a few dozen groups.
                dots = tuple(at for at, char in enumerate(pattern) if char == ".")
                forms = self._plain.setdefault(pattern.rpartition(".")[2], {})
                forms.setdefault((len(pattern), dots), {}).setdefault(pattern, position)
            else:
                self._others.append((position, pattern))

    def first(self, name: str) -> int | None:
        """Return the index of the first pattern that matches `name` or the text after a dot in `name`.

        If no pattern matches, return None.
        """
        if "\n" in name:  # Try every pattern, because `.` and `$` treat a newline differently from other characters.
            tried = ((at, _literal(p), p) for at, p in enumerate(self.patterns))
            return next((at for at, word, p in tried if (word == name if word else _behind_a_dot(p, name))), None)
        positions = [self._exact[name]] if name in self._exact else []
        for tail, forms in self._plain.items():
            if name.endswith(tail):
                positions += [at for form, known in forms.items() if (at := _among(name, form, known)) is not None]
        best = min(positions, default=len(self.values))
        others = (at for at, pattern in self._others if at < best and _behind_a_dot(pattern, name))
        best = min(next(others, best), best)
        return None if best == len(self.values) else best


def _behind_a_dot(pattern: str, name: str) -> bool:
    return matches(rf"(.*\.)?({pattern})$", name)


def _among(name: str, form: tuple[int, tuple[int, ...]], known: Mapping[str, int]) -> int | None:
    """Return the index of the pattern that matches `name` or the text after a dot in `name`; None if none does.

    All patterns in `known` have the same `form`: (length, positions of the dots). `known` maps patterns to indices.
    """
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
"""Matches patterns that are plain names. In such a pattern, every character except a dot matches only itself."""


def exactly(name: str) -> str:
    """Return a pattern that matches only `name`.

    As a pattern, `name` itself would also match other names. Each dot in it would match any character, and PEFT also
    compares a pattern with the text after each dot of a name.
    """
    return f"^{re.escape(name)}$"


def matches(pattern: str, name: str, *, whole: bool = False) -> bool:
    """Whether a config's regular expression fits the start of `name` or, with `whole`, all of `name`.

    Raises:
        Malformed: the pattern is not a regular expression.
        Unsupported: matching may take hours.
    """
    return _fits(pattern, name, "fullmatch" if whole else "match")


def finds(pattern: str, name: str) -> bool:
    """Whether a config's regular expression fits anywhere in `name`.

    Raises:
        Malformed: the pattern is not a regular expression.
        Unsupported: matching may take hours.
    """
    literal = _literal(pattern)
    return literal == name if literal else _fits(pattern, name, "search")


def _fits(pattern: str, name: str, kind: str) -> bool:
    try:
        return fits(pattern, name, kind)
    except TooSlow:
        why = "matching this regular expression may take hours"
        cure = "Write the pattern without repetitions inside repetitions, or list the names of the modules"
        raise Unsupported(why, where=pattern[:80], cure=cure) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise Malformed(
            f"this is not a valid regular expression ({error})", where=pattern[:80], cure=SAVE_WITH_PEFT
        ) from None


@lru_cache(maxsize=1 << 14)
def _literal(pattern: str) -> str:
    """Return the name for which `exactly` returns this pattern; empty if there is no such name."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
    return name if pattern == exactly(name) else ""


# Compute the config fields for ranks and alphas: the most common values, and patterns for all other modules.


Number = TypeVar("Number", bound=float)

Scale = tuple[int, float]
"""(rank, scaling) of a module."""


def number_fields(scales: Mapping[str, Scale], rslora: Sequence[bool]) -> tuple[dict[str, JsonValue], list[str]]:
    """Return the config fields for ranks and scalings, and the names of modules that have no exact alpha.

    `scales` maps module names to (rank, scaling). A module's alpha is exact if the scaling that PEFT computes from this
    alpha equals the module's scaling. `rslora` contains the allowed values of `use_rslora`. The function chooses the
    value with which the largest number of modules have an exact alpha.
    """
    tried = {flag: {name: exact_alpha(scale, flag) for name, scale in scales.items()} for flag in rslora}
    flag = min(tried, key=lambda flag: sum(alpha is None for alpha in tried[flag].values()))
    alphas = {name: alpha for name, alpha in tried[flag].items() if alpha is not None}
    r = _most_common([rank for rank, _ in scales.values()], 8)
    alpha = _most_common(list(alphas.values()), r)
    fields: dict[str, JsonValue] = {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": flag,
        "rank_pattern": {exactly(name): rank for name, (rank, _) in scales.items() if rank != r},
        "alpha_pattern": {exactly(name): value for name, value in alphas.items() if value != alpha},
    }
    return fields, [name for name in scales if name not in alphas]


def exact_alpha(scale: Scale, rslora: bool) -> int | float | None:
    """Return an alpha for which PEFT computes exactly this scaling, preferably an integer; None if there is none."""
    rank, scaling = scale
    divisor = math.sqrt(rank) if rslora else rank
    # Convert the scaling to float first. The product of a large integer and the rank may not fit in a float, and
    # `math.isfinite` would then raise OverflowError. The float product is infinite instead, and yields no alpha.
    guess = float(scaling) * divisor
    return next((alpha for alpha in _candidates(guess) if alpha / divisor == scaling), None)


def _candidates(guess: float) -> Iterator[int | float]:
    if not math.isfinite(guess):
        return
    if abs(guess) < 1 << 53:
        yield round(guess)
    yield guess
    yield math.nextafter(guess, math.inf)
    yield math.nextafter(guess, -math.inf)


def _most_common(values: Sequence[Number], default: Number) -> Number:
    count = Counter(values)
    return min(count, key=lambda value: (-count[value], value), default=default)
