"""Read the licence from a model card's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import Malformed
from ..io.inputs import open_input
from ..io.strict_yaml import load_yaml

Licence = Mapping[str, str]
"""`license` is an identifier; if it is `other`, `license_name` and `license_link` say which licence. May be empty."""

KEYS = ("license", "license_name", "license_link")
MAX_CARD = 1 << 20


def licence_called(name: str | Licence | None) -> Licence:
    """Return a licence given by its identifier, such as `apache-2.0`, or by a card's metadata."""
    return {"license": name} if isinstance(name, str) else name or {}


def licence_of(card: str) -> Licence:
    """Return the licence in a card's metadata; empty if the value is not a plausible identifier."""
    told = metadata(card)
    found = {key: told[key].strip() for key in KEYS if isinstance(told.get(key), str)}
    if not re.fullmatch(r"[A-Za-z0-9.+-]{1,64}", found.get("license", "")):
        return {}
    return {key: value for key, value in found.items() if value.isprintable() and len(value) <= 200}


def licence_at(path: Path) -> Licence:
    """Return the licence in the card in a folder, or next to a file."""
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
