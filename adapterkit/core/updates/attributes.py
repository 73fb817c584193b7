"""Plain values of an update, such as its scaling: fields with rules, and checks of type and rules."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import Malformed, Unsupported

DAMAGED = "The file is damaged, or the tool that wrote it is at fault; write it again"
_TYPES = {"float": (float, int), "int": (int,), "str": (str,), "bool": (bool,)}


def attribute(
    default: Any = dataclasses.MISSING, *, among: Collection[Any] = (), least: float | None = None,
    most: float | None = None,
    positive: bool = False, since: int = 1,
) -> Any:  # fmt: skip
    """Declare a field for a plain value with rules beyond its type.

    Args:
        default: the value if none is given; without a default, the attribute is required.
        among: the allowed words or numbers.
        least: the smallest allowed number.
        most: the largest allowed number.
        positive: require a number above 0.
        since: the version of the method that introduced the attribute.
    """
    rules = {"among": tuple(among), "least": least, "most": most, "positive": positive, "since": since}
    return dataclasses.field(default=default, metadata=rules)


def check_attribute(name: str, value: Any, field: dataclasses.Field[Any]) -> None:
    """Check a value against the type and the rules of its field.

    Raises:
        Malformed: it has another type, is not finite, or is out of range.
        Unsupported: it is a word that the method does not know.
    """
    _check_type(name, value, _type_name(field.type))
    _check_range(name, value, field.metadata)


def plain(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Return a value as plain data; an integer in a float field becomes a float."""
    return float(value) if type(value) is int and _type_name(field.type) == "float" else value


def _check_type(name: str, value: Any, annotation: str) -> None:
    allowed = _TYPES.get(annotation)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and annotation != "bool")):
        raise Malformed(f"{value!r} is not of type {annotation}", where=name, cure=DAMAGED)
    # Compare instead of converting: an integer may be too large for a float.
    if annotation == "float" and not -sys.float_info.max <= value <= sys.float_info.max:
        raise Malformed(f"{value} is not a finite number", where=name, cure=DAMAGED)


def _check_range(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    if rules.get("among") and value not in rules["among"]:
        raise Unsupported(f"unknown word {value!r}", where=name, cure=f"Known: {', '.join(map(str, rules['among']))}")
    if rules.get("least") is not None and value < rules["least"]:
        raise Malformed(f"{value} is below {rules['least']}", where=name, cure=DAMAGED)
    if rules.get("positive") and not value > 0:
        raise Malformed(f"{value} is not above 0", where=name, cure=DAMAGED)
    if rules.get("most") is not None and value > rules["most"]:
        raise Malformed(f"{value} is above {rules['most']}", where=name, cure=DAMAGED)


def _type_name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else str(getattr(annotation, "__name__", annotation))
