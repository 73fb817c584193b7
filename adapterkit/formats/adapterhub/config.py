"""Parse the config and check its fields, with special rules for old releases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ...errors import Malformed, Unsupported
from .families import FAMILIES, family_of_architecture
from .families._family import AdapterHubFamily
from .settings import Settings

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue


def parse(config: Mapping[str, JsonValue], interface: Mapping[str, object] | None = None) -> Settings:
    """Parse the settings in a config.

    Raises:
        Malformed: a field is missing or has the wrong type, or the name is invalid.
    """
    known = {name: config[name] for name in Settings.__struct_fields__ if name in config}
    try:
        settings = msgspec.convert(known | {"interface": interface and dict(interface)}, Settings)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        raise Malformed(why, where=place.strip("`").removeprefix("$.") or "name", cure=_REWRITE) from None
    if not settings.name or re.search(r"[./\\\0]", settings.name):
        why = f"{settings.name[:60]!r} is not a valid adapter name: it is empty, or has a dot or a slash"
        raise Malformed(why, where="name", cure="Load the adapter, and save it under another name")
    return settings


def parts(config: Mapping[str, object], settings: Settings) -> Iterator[tuple[str, type[AdapterHubFamily], Any]]:
    """Yield (place in the config, family, typed fields) for the config, or for each member of a union.

    Raises:
        Malformed: a field has the wrong type.
        Unsupported: an architecture is unknown, or an unknown field is set.
    """
    own = config.get("config")
    if not isinstance(own, dict):
        why = f"the config has {str(own)[:60]!r} instead of the method's fields"
        raise Malformed(why, where="config", cure="Load and save the adapter with a release since adapters 0.1")
    if own.get("architecture") != "union":
        yield _part(own, "config", settings)
        return
    members = own.get("configs")
    if not isinstance(members, list) or not members or not all(isinstance(member, dict) for member in members):
        raise Malformed("the union has no list of configs", where="config.configs", cure=_REWRITE)
    for position, member in enumerate(members):
        yield _part(member, f"config.configs[{position}]", settings)


def _part(own: Mapping[str, object], at: str, settings: Settings) -> tuple[str, type[AdapterHubFamily], Any]:
    architecture = own.get("architecture")
    family = family_of_architecture(architecture)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        why = f"this version does not know the architecture {str(architecture)[:60]!r}"
        raise Unsupported(why, where=f"{at}.architecture", cure=f"Known: {known}, union")
    for name, value in own.items():
        if value and name not in {**family.read, **family.harmless, "architecture": ""}:
            why = f"this version does not know this field, and its value {str(value)[:60]} may change the maths"
            raise Unsupported(why, where=f"{at}.{name}", cure=_UPGRADE)
    try:
        fields = msgspec.convert(dict(own), family.fields)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        raise Malformed(why, where=at + place.strip("`").removeprefix("$"), cure=_REWRITE) from None
    return at, family, family.settle(fields, settings)


_REWRITE = "Save the adapter again with the adapters library"
_UPGRADE = "Upgrade adapterkit, or remove the field if it is known to be harmless"
