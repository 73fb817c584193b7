"""Find out where a local model came from: from the report of a merge, or from the note of a pull."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UnknownFormat, UsageError
from ..io.locations import source_of
from ..merging.companions import CARD, REPORT
from .card import Model
from .digests import digests
from .uris import parse


def is_of_the_base(folder: Path) -> bool:
    """Whether the card in a folder is the base's, copied by a merge and not edited since."""
    card = folder / CARD
    if not card.is_file():
        return False
    told = record_at(folder).get("base_card")
    return told is not None and told == digests(card)[1]


def model_at(path: Path) -> Model:
    """Return the known facts about the model at a path.

    Raises:
        UnknownFormat: there is no model.
    """
    from ..io.checkpoint import open_checkpoint

    try:
        found = open_checkpoint(path)
    except UsageError as error:
        cure = "Name an adapter, or a folder of weights"
        raise UnknownFormat(f"neither an adapter nor a base: {error.why}", path=path, cure=cure) from None
    record = record_at(found.folder)
    adapters = _adapters(record)
    base, revision = _base_of(record, found.folder, adapters)
    return Model(base, revision, adapters, found.config or {})


def record_at(folder: Path) -> Mapping[str, Any]:
    """Return the report that a merge wrote into a folder; empty if there is none."""
    from ..io.checkpoint import read_json

    return read_json(folder / REPORT) if (folder / REPORT).is_file() else {}


def _adapters(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    told = record.get("adapters")
    return tuple(a for a in told if isinstance(a, dict)) if isinstance(told, list) else ()


def _base_of(
    record: Mapping[str, Any], folder: Path, adapters: tuple[Mapping[str, Any], ...]
) -> tuple[str | None, str | None]:
    """Return the base's name and commit: its download source, else the base that all adapters name."""
    told = record.get("base_uri")
    if isinstance(told, str):
        uri = parse(told)
        return uri.name, uri.revision
    if not adapters:
        origin = source_of(folder)
        return (origin.repo, origin.commit) if origin else (None, None)
    made_for = {str(adapter.get("base")) for adapter in adapters if adapter.get("base")}
    return (made_for.pop() if len(made_for) == 1 else None), None
