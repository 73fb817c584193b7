"""Parse and apply the user's rules for names. A rule is `FROM=TO`: two dotted names with placeholders such as `{n}`.

All operations accept the same rules. A rule `@FILE` reads rules from a file with one rule per line. Blank lines and
lines that start with `#` are skipped.

A rule `family:NAME` selects a family's file for a base whose config names no family. The rules `rows:by_head` and
`rows:by_part` state how a base orders the rows of fused queries, keys and values, if the base's files do not show the
order. The rules `in_out:GLOB` and `out_in:GLOB` state how a base stores the square weights of the modules that match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import Malformed, TargetNotFound, UsageError, nearest, shown, storage_error
from .architectures import Architecture, architecture_of

_HOLE = re.compile(r"\{([a-z])\}")
_TEMPLATE = re.compile(r"[\w$/-]*(?:(?:\.|^)(?:[\w$/-]+|\{[a-z]\}))*\.?")


@dataclass(frozen=True, slots=True)
class Rename:
    """One parsed rule. A rule `FROM=TO` replaces FROM in names that equal FROM or begin with FROM and a dot.

    Attributes:
        text: the rule as the user wrote it.
        pattern: a regular expression that matches the names to change. It has one group for each placeholder in FROM,
            and a group `rest` for the rest of the name.
        to: the replacement for FROM, with placeholders.
        family: NAME in a rule `family:NAME`, a model type; empty in other rules.
        rows: `by_head` or `by_part` in a rule `rows:...`; empty in other rules.
        layout: `in_out` or `out_in` in a rule `in_out:GLOB` or `out_in:GLOB`; empty in other rules.
        glob: GLOB in these two rules; empty in other rules.
    """

    text: str
    pattern: re.Pattern[str]
    to: str
    family: str = ""
    rows: str = ""
    layout: str = ""
    glob: str = ""

    @property
    def is_about_base(self) -> bool:
        """Whether the rule states a fact about the base, and renames nothing."""
        return bool(self.family or self.rows or self.layout)

    def apply(self, name: str) -> str | None:
        """Return the new name; None if the rule does not match."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        numbers = match.groupdict()
        rest = numbers.pop("rest")
        head = _HOLE.sub(lambda hole: numbers[hole[1]], self.to)
        return f"{head}.{rest}" if head and rest else head or rest


def read_rules(rename: str | Rename | Sequence[str | Rename] | None) -> tuple[str | Rename, ...]:
    """Return the rules in `rename`, a list or a single rule, with each `@FILE` replaced by the rules in that file.

    None and an empty list mean that there are no rules.

    Raises:
        StorageError: a file cannot be read.
        Malformed: a rules file is not valid UTF-8, or has more than 1 MiB.
        UsageError: `rename` is neither a text nor a list of texts, or a rules file contains an `@FILE`.
    """
    given = [rename] if isinstance(rename, str | Rename) else () if rename is None else rename
    if not isinstance(given, Sequence | AbstractSet) or not all(isinstance(rule, str | Rename) for rule in given):
        raise UsageError(f"{shown(rename)} is not a rule or a list of rules", where="rename", cure=_FORM)
    rules: list[str | Rename] = []
    for rule in given:
        if isinstance(rule, str) and rule.startswith("@"):
            rules += _read(Path(rule[1:]))
        else:
            rules.append(rule)
    return tuple(rules)


def rule_texts(rename: str | Sequence[str | Rename]) -> tuple[str, ...]:
    """Return the texts of all rules, with each `@FILE` replaced by the rules in that file.

    Plans and records store these texts, because a rules file may change or disappear.

    Raises:
        StorageError, Malformed, UsageError: see `read_rules`.
    """
    return tuple(rule.text if isinstance(rule, Rename) else rule for rule in read_rules(rename))


def parse_renames(
    rename: str | Sequence[str | Rename], names: Iterable[str] | None = None, base: Iterable[str] | None = None
) -> tuple[Rename, ...]:
    """Parse the user's rules for names.

    Args:
        rename: one rule or several, each `FROM=TO`, `@FILE`, `family:NAME`, `rows:by_head`, `rows:by_part`,
            `in_out:GLOB` or `out_in:GLOB`. An empty FROM puts TO before every name; an empty TO removes FROM.
            Rules that are already parsed are returned unchanged, without the check against `names`.
        names: the names to rename. Every rule `FROM=TO` must match at least one of them; None skips this check.
        base: the names of the base's modules or tensors. If this and `names` are given, the GLOB of every rule
            `in_out:GLOB` or `out_in:GLOB` must match one of them, or one of `names`. These rules are applied to
            the base's names, which may differ from the adapter's.

    Raises:
        UsageError: a rule does not have exactly one `=`, has a character that names cannot have, has a placeholder only
            in TO, names an unknown family or an unknown order of rows, or has an empty GLOB. Or a rules file contains
            an `@FILE`.
        TargetNotFound: a rule matches none of `names`.
        StorageError, Malformed: see `read_rules`.
    """
    given = read_rules(rename)
    rules = tuple(rule if isinstance(rule, Rename) else _parse(rule) for rule in given)
    known = () if names is None or not rules else tuple(names)
    for rule, written in zip(rules, given, strict=True):
        if not known or not isinstance(written, str):
            continue
        if rule.layout and base is not None:
            paths = [*known, *(name.removesuffix(".weight") for name in base)]
            matched = any(fnmatchcase(path, rule.glob) for path in paths)
        else:
            matched = rule.is_about_base or any(rule.apply(name) is not None for name in known)
        if not matched:
            near = nearest(rule.glob or rule.text.partition("=")[0], known)
            cure = f"Correct --rename (rename=), or omit the rule. {near}".rstrip(". ")
            raise TargetNotFound(f"the rule {rule.text!r} matches no target", where=known[0], cure=cure)
    return rules


def renamed_by(name: str, rules: Sequence[Rename]) -> tuple[str, Rename | None]:
    """Apply the first rule that matches a name.

    Return the new name and this rule. If no rule matches, return the unchanged name and None.
    """
    for rule in rules:
        renamed = rule.apply(name)
        if renamed is not None:
            return renamed, rule
    return name, None


def family_of(rules: Sequence[Rename]) -> Architecture | None:
    """Return the family that a rule `family:NAME` names; None if there is no such rule."""
    return next((architecture_of({"model_type": rule.family}) for rule in rules if rule.family), None)


def layout_of(rules: Sequence[Rename], path: str) -> str:
    """Return `in_out` or `out_in`, as the first such rule states that matches the module `path`; empty if none does."""
    return next((rule.layout for rule in rules if rule.layout and fnmatchcase(path, rule.glob)), "")


def _read(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise storage_error(error, path) from error
    if len(data) > _LARGEST:
        raise Malformed(
            f"the file has more than {_LARGEST:,} bytes", path=path, cure="Pass a rules file, with one FROM=TO per line"
        )
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise Malformed(
            "the file is not valid UTF-8", path=path, cure="Pass a rules file, with one FROM=TO per line"
        ) from None
    rules = [line for line in lines if line and not line.startswith("#")]
    nested = next((rule for rule in rules if rule.startswith("@")), None)
    if nested is not None:
        raise UsageError(
            f"a rules file cannot contain {nested!r}", path=path, cure="Pass each file with --rename @FILE (rename=)"
        )
    return rules


def _parse(rule: str) -> Rename:
    if rule.startswith(_ROWS) and "=" not in rule:
        order = rule.removeprefix(_ROWS).strip()
        if order not in (BY_HEAD, BY_PART):
            cure = f"Write --rename rows:{BY_HEAD} or --rename rows:{BY_PART} (rename=)"
            raise UsageError(f"{rule!r} names an unknown order {order!r}", where="rename", cure=cure)
        return Rename(rule, _NOTHING, "", rows=order)
    if rule.startswith(_FAMILY) and "=" not in rule:
        family = rule.removeprefix(_FAMILY).strip()
        if architecture_of({"model_type": family}) is None:
            cure = "Write the model_type of a family in spec/architectures, such as --rename family:mixtral (rename=)"
            raise UsageError(f"{rule!r} names an unknown family {family!r}", where="rename", cure=cure)
        return Rename(rule, _NOTHING, "", family)
    layout, colon, glob = rule.partition(":")
    if colon and layout in (IN_OUT, OUT_IN) and "=" not in rule:
        if not glob.strip():
            cure = f"Write --rename '{layout}:GLOB' (rename=), such as --rename '{layout}:decoder.*.c_proj'"
            raise UsageError(f"{rule!r} names no module", where="rename", cure=cure)
        return Rename(rule, _NOTHING, "", layout=layout, glob=glob.strip())
    old, equals, new = rule.partition("=")
    old, new = old.strip().removesuffix("."), new.strip().removesuffix(".")
    if not equals or "=" in new or not (old or new) or not (_TEMPLATE.fullmatch(old) and _TEMPLATE.fullmatch(new)):
        raise UsageError(f"{rule!r} is not a valid rule", where="rename", cure=_FORM)
    missing = [hole for hole in _HOLE.findall(new) if hole not in _HOLE.findall(old)]
    if missing:
        raise UsageError(f"{rule!r} has {{{missing[0]}}} in TO, but not in FROM", where="rename", cure=_FORM)
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


BY_HEAD, BY_PART = "by_head", "by_part"
"""Orders of the rows of fused queries, keys and values.

`by_head`: for each head, the rows of its query, then its key, then its value. `by_part`: all queries, then all keys,
then all values.
"""

IN_OUT, OUT_IN = "in_out", "out_in"
"""Axis orders of a stored weight: inputs first, as in the Conv1D of GPT-2, or outputs first."""

_FAMILY, _ROWS = "family:", "rows:"
_NOTHING = re.compile(r"(?!)")
_LARGEST = 1 << 20
_FORM = "Write --rename 'FROM=TO' (rename=['FROM=TO']), such as 'model.language_model=language_model.model'"
