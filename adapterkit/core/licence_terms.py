"""List what the licences of a merged model's parts (base and adapters) require, and where these licences conflict.

The licences are data in `spec/licences.toml`. A model card may name a wrong licence, and only lawyers can say whether
changed weights are a derivative work. So these functions return sentences for warnings, and only `check_licences` turns
the sentences into an error.

A licence may be an SPDX expression: `MIT OR Apache-2.0`, `(GPL-3.0 OR MIT) AND CC-BY-4.0`, `GPL-2.0 WITH exception`.
The grammar is that of SPDX 3.0, annex B: AND binds closer than OR, and case does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import msgspec

from ..errors import CheckFailed, Malformed
from ..io.inputs import open_input, read_input
from ..io.strict_yaml import load_yaml

IDENTIFIER = r"[A-Za-z0-9.+-]{1,64}"
_TOKEN = re.compile(rf"\s*([()]|{IDENTIFIER}(?=[\s()]|$))")
_MOST = 64
"""An expression may have at most this many words, and may offer at most this many alternatives."""

Alternatives = tuple[tuple[str, ...], ...]
"""Sets of licences. A user of the model chooses one set, and must comply with all licences in this set."""


@cache
def alternatives(text: str) -> Alternatives | None:
    """Parse an SPDX expression, and return the alternative sets of licences. The user may choose any one set.

    The licences are in lower case. A licence with an exception, such as `gpl-2.0 with classpath-exception-2.0`, counts
    as one licence. Return None if `text` is not an expression, or has more than `_MOST` words or alternatives.

    Example:
        >>> alternatives("MIT AND (GPL-3.0 OR Apache-2.0)")
        (('mit', 'gpl-3.0'), ('mit', 'apache-2.0'))
    """
    words = _words(text)
    if words is None:
        return None
    try:
        parsed = _any(words)
    except (IndexError, ValueError):
        return None
    return None if words else parsed


def _words(text: str) -> list[str] | None:
    """Return the words of an expression, last word first.

    Return None if there are more than `_MOST` words, or if the text contains a character that is not allowed.
    """
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
    parsed = _every(words)
    while words and words[-1] == "or":
        words.pop()
        parsed += _every(words)
    return _bounded(parsed)


def _every(words: list[str]) -> Alternatives:
    parsed = _one(words)
    while words and words[-1] == "and":
        words.pop()
        parsed = _bounded(tuple(tuple(dict.fromkeys(a + b)) for a, b in product(parsed, _one(words))))
    return parsed


def _one(words: list[str]) -> Alternatives:
    word = words.pop()
    if word == "(":
        parsed = _any(words)
        if words.pop() != ")":
            raise ValueError("an open parenthesis")
        return parsed
    if word in (")", "and", "or", "with"):
        raise ValueError("an operator without a licence")
    if words and words[-1] == "with":
        words.pop()
        exception = words.pop()
        if exception in ("(", ")", "and", "or", "with"):
            raise ValueError("no exception after with")
        word = f"{word} with {exception}"
    return ((word,),)


def _bounded(alternatives_: Alternatives) -> Alternatives:
    if len(alternatives_) > _MOST:
        raise ValueError("too many alternatives")
    return tuple(dict.fromkeys(alternatives_))


# Read the licence from a model card's metadata.


Licence = Mapping[str, str]
"""The fields in `KEYS` that a model card contains. If `license` is `other`, `license_name` is the licence's name."""

KEYS = ("license", "license_name", "license_link")
MAX_CARD = 1 << 20


def licence_called(name: str | Licence | None) -> Licence:
    """Convert an identifier, such as `apache-2.0`, to a `Licence`.

    None is converted to an empty `Licence`. A `Licence` is returned unchanged.
    """
    return {"license": name} if isinstance(name, str) else name or {}


def licence_of(card: str) -> Licence:
    """Return the licence in the metadata of a card's text; empty if `license` is not valid.

    `license` may be an identifier, an SPDX expression, or a list of these.
    """
    card_fields = dict(metadata(card))
    listed = card_fields.get("license")
    if isinstance(listed, list) and all(isinstance(each, str) and alternatives(each) for each in listed):
        # A card does not say whether a user may choose from the list, so assume that all of its licences apply.
        card_fields["license"] = " AND ".join(
            each if re.fullmatch(IDENTIFIER, each) else f"({each})" for each in listed
        )
    licence = {key: card_fields[key].strip() for key in KEYS if isinstance(card_fields.get(key), str)}
    if alternatives(licence.get("license", "")) is None:
        return {}
    return {key: value for key, value in licence.items() if value.isprintable() and len(value) <= 200}


def licence_at(path: Path) -> Licence:
    """Return the licence in the model card `README.md`, which is in the folder `path` or next to the file `path`."""
    card = (path if path.is_dir() else path.parent) / "README.md"
    try:
        with open_input(card) as file:
            return licence_of(file.read(MAX_CARD).decode("utf-8", "replace"))
    except (OSError, Malformed):
        return {}


def metadata(card: str) -> Mapping[str, Any]:
    """Return the metadata at the head of a model card; empty if the card has no metadata that is a YAML mapping."""
    head = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        fields = load_yaml(head[1].encode("utf-8", "replace")) if head else None
    except Malformed:
        return {}
    return fields if isinstance(fields, dict) else {}


# Terms of licences, and conflicts between them.


FORMAT = 1

BASE = "the base"
"""The name that stands for the base in a list of a merged model's parts."""

Part = tuple[str, Licence]
"""One part of a merged model: its name (`BASE`, or the name of an adapter), and the licence in its card."""


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The requirements of a family of licences; the head of `spec/licences.toml` explains each field."""

    asks: str
    commercial: bool = True
    changes: bool = True
    whole: bool = False
    restricts: bool = False

    @property
    def plain(self) -> bool:
        """Whether the licence requires only that notices are kept."""
        return self.commercial and self.changes and not self.whole and not self.restricts


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    family: str
    spdx: str | None = None
    into: tuple[str, ...] = ()


class _LicenceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    families: dict[str, Terms]
    licences: dict[str, _Entry]
    names: dict[str, str]


@cache
def _table() -> _LicenceTable:
    installed = Path(__file__).parent / "data" / "licences.toml"
    path = installed if installed.is_file() else Path(__file__).parents[2] / "spec" / "licences.toml"
    table = msgspec.toml.decode(read_input(path), type=_LicenceTable)
    if table.format != FORMAT:
        why = f"the table has format {table.format}, but this version reads format {FORMAT}"
        raise Malformed(why, path=path, cure="Install adapterkit again")
    return table


def family_of(licence: Licence) -> str | None:
    """Return the family of a licence, such as `permissive` or `llama`; None if the table lacks the licence."""
    entry = _table().licences.get(_id(licence))
    return entry.family if entry is not None else _table().names.get(licence.get("license_name", "").lower())


def terms_of(licence: Licence) -> Terms | None:
    """Return the requirements of a licence; None if the table lacks the licence."""
    family = family_of(licence)
    return None if family is None else _table().families[family]


def spdx_of(licence: Licence) -> str | None:
    """Return the SPDX identifier of a licence; None if the licence has none, like most community licences."""
    entry = _table().licences.get(_id(licence))
    return None if entry is None else entry.spdx


def is_expression(licence: Licence) -> bool:
    """Whether the field `license` is an SPDX expression of several words, instead of a single identifier."""
    return " " in _id(licence)


def spdx_expression_of(licence: Licence) -> str | None:
    """Return the licence as an SPDX expression.

    Return None if the expression contains a licence for which the table has no SPDX identifier.
    """
    words = re.findall(rf"\(|\)|{IDENTIFIER}", licence.get("license", ""))
    tokens, exception = [], False
    for word in words:
        known = _table().licences.get(word.lower())
        operator = word in "()" or word.lower() in ("and", "or", "with")
        if not (operator or exception) and (known is None or known.spdx is None):
            return None
        tokens.append(word.upper() if operator else word if exception or known is None else str(known.spdx))
        exception = word.lower() == "with"
    return " ".join(tokens).replace("( ", "(").replace(" )", ")")


def choices(licence: Licence) -> list[list[Licence]]:
    """Return the alternative sets of single licences. A user of the model may choose any one of these sets.

    Sets with a licence that is not in the table are returned only if every set contains such a licence.
    """
    options = alternatives(licence.get("license", "")) if is_expression(licence) else None
    if options is None:
        return [[licence]]
    single: list[list[Licence]] = [[{"license": each} for each in some] for some in options]
    known = [some for some in single if all(terms_of(each) is not None for each in some)]
    return known or single


_MOST_READINGS = 256


def _readings(parts: Sequence[Part]) -> list[list[Part]]:
    """Choose one set of licences for each part. Return all such combinations, but at most `_MOST_READINGS` of them.

    A combination is a list of pairs (name of a part, single licence), one pair for each licence in the chosen sets.
    """
    each = [[[(name, licence) for licence in some] for some in choices(licence)] for name, licence in parts]
    return [[part for some in choice for part in some] for choice in islice(product(*each), _MOST_READINGS)]


def called(licence: Licence) -> str:
    """Return the licence's name for messages: `apache-2.0`, or the `license_name` if the identifier is `other`."""
    identifier = licence.get("license", "")
    return licence.get("license_name", identifier) if identifier == "other" else identifier


def conflicts(parts: Sequence[Part]) -> tuple[str, ...]:
    """Return a sentence for each contradiction between the licences of a model's parts.

    If a card lets the user choose between licences, the choice with the fewest contradictions counts.

    Args:
        parts: base and adapters, in order. Parts without a licence, and licences that the table lacks, are ignored.
    """
    return min((_contradictions(reading) for reading in _readings(parts)), key=len)


def _contradictions(parts: Sequence[Part]) -> tuple[str, ...]:
    """Return a sentence for each contradiction between licences; each entry of `parts` has a single licence."""
    known = [(name, licence, terms) for name, licence in parts if (terms := terms_of(licence)) is not None]
    if len(known) < 2:
        return ()
    problems = [
        f"{_cited(name, licence)}, which does not allow sharing changed copies"
        for name, licence, terms in known if not terms.changes
    ]  # fmt: skip
    for at, (name, licence, terms) in enumerate(known):
        for other, second, others in known[at + 1 :]:
            if _id(licence) == _id(second) or (terms.whole and others.whole and _meet(licence, second)):
                continue
            pair = f"{_cited(name, licence)}, and {_cited(other, second)}"
            if terms.whole and others.whole:
                problems.append(f"{pair}: each licence must cover the whole model")
            elif _adds_limits(terms, others) or _adds_limits(others, terms):
                problems.append(
                    f"{pair}: one licence must cover the whole model without further limits, but the other adds limits"
                )
            elif terms.commercial != others.commercial:
                strict = name if not terms.commercial else other
                problems.append(f"{pair}: the result allows no commercial use, because of {strict}")
    return tuple(dict.fromkeys(problems))


def _adds_limits(whole: Terms, other: Terms) -> bool:
    """Whether `other` limits the use of the model, but `whole` must cover the whole model and has no such limits."""
    return whole.whole and not whole.restricts and other.restricts


def passed_over(stated: Licence, parts: Sequence[Part]) -> tuple[str, ...]:
    """Return a sentence for each part whose licence has requirements that the merged model's licence lacks.

    Args:
        stated: the licence in the merged model's card.
        parts: the base and the adapters of the merged model.
    """
    overlooked: list[str] = []
    for owns in choices(stated):
        omitted = [
            [part for part in reading if all(_omits(terms, part[1]) for terms in owns)] for reading in _readings(parts)
        ]
        for name, licence in min(omitted, key=len):
            terms = terms_of(licence)
            asks = terms.asks if terms is not None else ""
            overlooked.append(f"the card says {called(stated)}, but {_cited(name, licence)}, which {asks}")
    return tuple(dict.fromkeys(overlooked))


def _omits(stated: Licence, licence: Licence) -> bool:
    """Whether `stated`, the merged model's licence, omits a requirement of `licence`, the licence of a part.

    Each is a single licence, not an expression with several licences.
    """
    stated_terms, terms = terms_of(stated), terms_of(licence)
    if stated_terms is None or terms is None or _id(licence) == _id(stated) or _id(stated) in _reached(licence):
        return False
    dropped = (
        (terms.restricts and not stated_terms.restricts)
        or (stated_terms.commercial and not terms.commercial)
        or terms.whole
    )
    return dropped or not terms.changes


def unknown(parts: Sequence[Part]) -> tuple[str, ...]:
    """Return a sentence for each part whose requirements are unknown: its licence is missing, or not in the table."""
    return tuple(
        f"{name} is under {called(licence)}, which is not in the table of licences" if called(licence)
        else f"{name} names no licence"
        for name, licence in parts
        if any(terms_of(each) is None for each in choices(licence)[0])
    )  # fmt: skip


def check_licences(parts: Sequence[Part], against: Sequence[str], path: Path | str) -> None:
    """Raise an error if licences contradict each other, or if a part's licence is missing or unknown.

    Args:
        parts: base and adapters, including those without a licence; for a push, also the model or adapter to push.
        against: the sentences that `conflicts` and `passed_over` returned.
        path: the file or folder that the error names: the base of a merge, or the model or adapter to push.

    Raises:
        CheckFailed: `against` is not empty, or a part's licence is missing or not in the table.
    """
    problems = [*against, *unknown(parts)]
    if problems:
        cure = (
            "Choose parts whose licences agree, name the licence in the README.md of each part, or leave out "
            "--strict-licence (strict_licence=False): the contradictions are then only warnings"
        )
        raise CheckFailed(f"licences: {'; '.join(problems)}", path=path, cure=cure)


def parts_of(record: Mapping[str, object]) -> list[Part]:
    """Return the base and the adapters in the record of a merge, each with the licence from its card."""
    licences = record.get("licences")
    pairs = licences.items() if isinstance(licences, Mapping) else ()
    parts = [(str(name), licence) for name, licence in pairs if isinstance(licence, Mapping)]
    # Put the base first: a record is written with sorted keys, so the order of the parts is lost.
    return sorted(parts, key=lambda part: part[0] != BASE)


def _id(licence: Licence) -> str:
    return licence.get("license", "").lower()


def _cited(name: str, licence: Licence) -> str:
    return f"{name} is under {called(licence)}"


def _reached(licence: Licence) -> set[str]:
    """Return the other licences that a merged model may have if one of its parts has `licence`.

    The table's entry for `licence` lists some of these licences in its field `into`. The entries of the listed licences
    may list further licences in the same way. Those licences are also returned.
    """
    reached: set[str] = set()
    left = [_id(licence)]
    while left:
        entry = _table().licences.get(left.pop())
        new = set(entry.into if entry is not None else ()) - reached
        reached |= new
        left += new
    return reached


def _meet(first: Licence, second: Licence) -> bool:
    return bool(({_id(first)} | _reached(first)) & ({_id(second)} | _reached(second)))
