"""Rules that a user gives: `FROM=TO`, templates of dotted names; `{n}` and other holes stand for numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError

_HOLE = re.compile(r"\{([a-z])\}")
_TEMPLATE = re.compile(r"[\w$/-]*(?:(?:\.|^)(?:[\w$/-]+|\{[a-z]\}))*\.?")


@dataclass(frozen=True, slots=True)
class Rename:
    """One rule. It renames a name that is FROM, or begins with it, whole words only; the rest stays as it is.

    Attributes:
        text: as the user wrote it.
        pattern: matches a name, with a group for each hole and one for the rest.
        to: what FROM becomes, with the holes in it.
    """

    text: str
    pattern: re.Pattern[str]
    to: str

    def apply(self, name: str) -> str | None:
        """The name by this rule; None where the rule is not about it."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        numbers = found.groupdict()
        rest = numbers.pop("rest")
        head = _HOLE.sub(lambda hole: numbers[hole[1]], self.to)
        return f"{head}.{rest}" if head and rest else head or rest


def parse_renames(rules: Sequence[str]) -> tuple[Rename, ...]:
    """Parse rules.

    Args:
        rules: each `FROM=TO`. An empty FROM puts TO before every name; an empty TO takes FROM off.

    Raises:
        UsageError: a rule without `=`, with more than one, with other characters than names have, or with a hole in
            TO that FROM does not have.
    """
    return tuple(_parse(rule) for rule in rules)


def _parse(rule: str) -> Rename:
    old, equals, new = rule.partition("=")
    old, new = old.strip().removesuffix("."), new.strip().removesuffix(".")
    if not equals or "=" in new or not (old or new) or not (_TEMPLATE.fullmatch(old) and _TEMPLATE.fullmatch(new)):
        raise UsageError(f"{rule!r} is not a rule", where="rename", cure=_FORM)
    missing = [hole for hole in _HOLE.findall(new) if hole not in _HOLE.findall(old)]
    if missing:
        raise UsageError(f"{rule!r}: {{{missing[0]}}} is not in FROM", where="rename", cure=_FORM)
    seen: set[str] = set()

    def group(hole: re.Match[str]) -> str:
        name = hole[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d{{1,9}})"

    text = re.sub(r"\\\{([a-z])\\\}", group, re.escape(old))
    tail = r"(?:\.(?P<rest>.+))?" if old else r"(?P<rest>.+)"
    return Rename(rule, re.compile(text + tail), new)


_FORM = "Write --rename 'FROM=TO' (rename=['FROM=TO']), such as 'model.language_model=language_model.model'"
