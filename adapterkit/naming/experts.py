"""Map names of single experts to a stack and back, for formats that stack experts which the base stores one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .tables import PREFIXES


class Experts:
    """Maps our name for one expert's module to the stack's name and the expert's number, and back.

    Args:
        pairs: a map from our template with `{n}` and `{e}` to the stack's template with `{n}`.
    """

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self._own = {_regex(own): stack for own, stack in pairs.items()}
        self._stacks = {_regex(stack): own for own, stack in pairs.items()}

    def there(self, own: str) -> tuple[str, int] | None:
        """Return the stack's name and the expert's number; None if the name is not that of an expert."""
        for pattern, stack in self._own.items():
            if found := pattern.fullmatch(own):
                return found["prefix"] + stack.replace("{n}", found["n"]), int(found["e"])
        return None

    def back(self, stack: str, count: int) -> list[str] | None:
        """Return our names for a stack's experts, by number; None if the name is not that of a stack."""
        for pattern, own in self._stacks.items():
            if found := pattern.fullmatch(stack):
                name = found["prefix"] + own.replace("{n}", found["n"])
                return [name.replace("{e}", str(index)) for index in range(count)]
        return None


def _regex(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{n\}", r"(?P<n>\d{1,9})").replace(r"\{e\}", r"(?P<e>\d{1,9})")
    prefixes = "|".join(map(re.escape, sorted(PREFIXES, key=len, reverse=True)))
    return re.compile(f"(?P<prefix>(?:{prefixes})?){text}")
