"""List the requirements of the licences of a merged model's parts (base and adapters), and conflicts between them.

The licences are data in `spec/licences.toml`. A card may name a wrong licence, and only lawyers can say whether changed
weights are an adapted work. So the functions return sentences for warnings; only `check_licences` raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ..errors import CheckFailed, Malformed
from ..io.inputs import open_input, read_input
from ..io.strict_yaml import load_yaml

# Read the licence from a model card's metadata.


Licence = Mapping[str, str]
"""The fields about the licence in a model card; all may be empty. If `license` is `other`, name and link are used."""

KEYS = ("license", "license_name", "license_link")
MAX_CARD = 1 << 20


def licence_called(name: str | Licence | None) -> Licence:
    """Return the licence for an identifier, such as `apache-2.0`, or for the metadata of a card."""
    return {"license": name} if isinstance(name, str) else name or {}


def licence_of(card: str) -> Licence:
    """Return the licence in a card's metadata; empty if the value is not a plausible identifier."""
    told = metadata(card)
    found = {key: told[key].strip() for key in KEYS if isinstance(told.get(key), str)}
    if not re.fullmatch(r"[A-Za-z0-9.+-]{1,64}", found.get("license", "")):
        return {}
    return {key: value for key, value in found.items() if value.isprintable() and len(value) <= 200}


def licence_at(path: Path) -> Licence:
    """Return the licence that a model card states; the card is in the folder `path`, or next to the file `path`."""
    card = (path if path.is_dir() else path.parent) / "README.md"
    try:
        with open_input(card) as file:
            return licence_of(file.read(MAX_CARD).decode("utf-8", "replace"))
    except (OSError, Malformed):
        return {}


def metadata(card: str) -> Mapping[str, Any]:
    """Return the metadata at the head of a card; empty if it is not a YAML mapping."""
    head = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        told = load_yaml(head[1].encode("utf-8", "replace")) if head else None
    except Malformed:
        return {}
    return told if isinstance(told, dict) else {}


# Terms of licences, and conflicts between them.


FORMAT = 1

BASE = "the base"
"""The name by which lists of a merged model's parts call the base."""

Part = tuple[str, Licence]
"""The name of a part (`BASE`, or the name of an adapter), and the licence in the part's card."""


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The requirements of a family of licences; see the head of `spec/licences.toml`."""

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


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    families: dict[str, Terms]
    licences: dict[str, _Entry]
    names: dict[str, str]


@cache
def _table() -> _Table:
    installed = Path(__file__).parent / "data" / "licences.toml"
    path = installed if installed.is_file() else Path(__file__).parents[2] / "spec" / "licences.toml"
    found = msgspec.toml.decode(read_input(path), type=_Table)
    if found.format != FORMAT:
        why = f"the table has format {found.format}, but this version reads format {FORMAT}"
        raise Malformed(why, path=path, cure="Correct it")
    return found


def family_of(licence: Licence) -> str | None:
    """Return the family of a licence, such as `permissive` or `llama`; None if the table lacks the licence."""
    entry = _table().licences.get(_id(licence))
    return entry.family if entry is not None else _table().names.get(licence.get("license_name", "").lower())


def terms_of(licence: Licence) -> Terms | None:
    """Return the requirements of a licence; None if the table lacks the licence."""
    family = family_of(licence)
    return None if family is None else _table().families[family]


def spdx_of(licence: Licence) -> str | None:
    """Return the SPDX identifier of a licence; None if it lacks an identifier, like most community licences."""
    entry = _table().licences.get(_id(licence))
    return None if entry is None else entry.spdx


def called(licence: Licence) -> str:
    """Return the licence's name for messages: `apache-2.0`, or the `license_name` if the identifier is `other`."""
    told = licence.get("license", "")
    return licence.get("license_name", told) if told == "other" else told


def conflicts(parts: Sequence[Part]) -> tuple[str, ...]:
    """Return the contradictions between the licences of a model's parts, one sentence each.

    Args:
        parts: base and adapters, in order. Parts without a licence, and licences that the table lacks, are ignored.
    """
    known = [(name, licence, terms) for name, licence in parts if (terms := terms_of(licence)) is not None]
    if len(known) < 2:
        return ()
    found = [
        f"{_cited(name, licence)}, which allows no changed copies to be shared"
        for name, licence, terms in known if not terms.changes
    ]  # fmt: skip
    for at, (name, licence, terms) in enumerate(known):
        for other, second, others in known[at + 1 :]:
            if _id(licence) == _id(second) or (terms.whole and others.whole and _meet(licence, second)):
                continue
            pair = f"{_cited(name, licence)}, and {_cited(other, second)}"
            if terms.whole and others.whole:
                found.append(f"{pair}: each of them must cover the whole model")
            elif _adds_limits(terms, others) or _adds_limits(others, terms):
                found.append(
                    f"{pair}: one must cover the whole model without further limits, but the other adds limits"
                )
            elif terms.commercial != others.commercial:
                strict = name if not terms.commercial else other
                found.append(f"{pair}: the result allows no commercial use, because of {strict}")
    return tuple(dict.fromkeys(found))


def _adds_limits(whole: Terms, other: Terms) -> bool:
    """Whether two licences conflict: `whole` must cover the model without further limits, but `other` adds limits."""
    return whole.whole and not whole.restricts and other.restricts


def passed_over(stated: Licence, parts: Sequence[Part]) -> tuple[str, ...]:
    """Return a sentence for each requirement of a part's licence that the licence of the merged model lacks.

    Args:
        stated: the licence in the merged model's card.
        parts: the base and the adapters of the merged model.
    """
    own = terms_of(stated)
    if own is None:
        return ()
    found = []
    for name, licence in parts:
        terms = terms_of(licence)
        if terms is None or _id(licence) == _id(stated) or _id(stated) in _reached(licence):
            continue
        dropped = (terms.restricts and not own.restricts) or (own.commercial and not terms.commercial) or terms.whole
        if dropped or not terms.changes:
            found.append(f"the card says {called(stated)}, but {_cited(name, licence)}, which {terms.asks}")
    return tuple(dict.fromkeys(found))


def unknown(parts: Sequence[Part]) -> tuple[str, ...]:
    """Return a sentence for each part whose requirements are unknown: its licence is missing, or not in the table."""
    return tuple(
        f"{name} is under {called(licence)}, which is not in the table of licences" if called(licence)
        else f"{name} names no licence"
        for name, licence in parts if terms_of(licence) is None
    )  # fmt: skip


def check_licences(parts: Sequence[Part], against: Sequence[str], path: Path | str) -> None:
    """Refuse contradictions between licences, and parts whose licence is missing or unknown.

    Args:
        parts: base and adapters, also those without a licence.
        against: the sentences of `conflicts` and `passed_over`.
        path: the merged or pushed file or folder, for the error.

    Raises:
        CheckFailed: `against` is not empty, or a part's licence is missing or not in the table.
    """
    found = [*against, *unknown(parts)]
    if found:
        cure = (
            "Choose parts whose licences agree, name the licence in the README.md of each, or leave out "
            "--strict-licence (strict_licence=False), which makes these warnings"
        )
        raise CheckFailed(f"licences: {'; '.join(found)}", path=path, cure=cure)


def parts_of(record: Mapping[str, object]) -> list[Part]:
    """Return the parts that a merge's record lists, each with the licence in its card."""
    told = record.get("licences")
    pairs = told.items() if isinstance(told, Mapping) else ()
    found = [(str(name), licence) for name, licence in pairs if isinstance(licence, Mapping)]
    # Put the base first: records are written with sorted keys.
    return sorted(found, key=lambda part: part[0] != BASE)


def _id(licence: Licence) -> str:
    return licence.get("license", "").lower()


def _cited(name: str, licence: Licence) -> str:
    return f"{name} is under {called(licence)}"


def _reached(licence: Licence) -> set[str]:
    """Return all licences that a merged model may have if a part has `licence`.

    A licence lists compatible licences, each of which may list further compatible licences; all are included.
    """
    found: set[str] = set()
    left = [_id(licence)]
    while left:
        entry = _table().licences.get(left.pop())
        new = set(entry.into if entry is not None else ()) - found
        found |= new
        left += new
    return found


def _meet(first: Licence, second: Licence) -> bool:
    return bool(({_id(first)} | _reached(first)) & ({_id(second)} | _reached(second)))
