"""A family's entries as the text of its file."""

from __future__ import annotations

from typing import Any

from entries import HUB, LIVE, Entries


def toml_of(family: str, model_types: list[str], entries: Entries, sources: list[str]) -> str:
    """The file's text: one line a weight."""
    lines = [
        "# Made by tools/foreign/architectures and reviewed. spec/architectures/README.md says what each field means.",
        "format = 1",
        f"family = {_value(family)}",
        f"model_types = {_value(model_types)}",
        f"sources = {_value(sources)}",
        f"keyed = {_value([LIVE, HUB])}",
    ]
    if entries.vocabulary:
        lines.append(f"vocabulary = {_value(entries.vocabulary)}")
    if entries.tied:
        lines.append(f"tied = {_value(entries.tied)}")
    lines += ["", "[weights]"]
    for weight, places in entries.weights.items():
        short = {naming: _short(place) for naming, place in places.items()}
        lines.append(f"{_value(weight)} = {_value(short)}")
    return "\n".join(lines) + "\n"


def _short(place: dict[str, Any]) -> Any:
    return place["name"] if set(place) == {"name"} else place


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        assert not {'"', "\\"} & {*value}
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if not value:
        return "{}"
    return "{ " + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + " }"


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() else f'"{key}"'
