"""Find families of tensors. A family has a `peft_type`, kinds of keys and config fields; it reads and writes files.

LoRA, DoRA, IA3, token rows and whole parameters belong to no family; modules next to this package read them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ....core.registry import Registry
from ..pairs import BESIDE
from ._family import Family, Parts

if TYPE_CHECKING:
    from ....core.updates import Update

__all__ = ["FAMILIES", "PEFT_TYPES", "Family", "Parts", "family_of", "family_of_method", "family_of_type"]

PEFT_TYPES = ("IA3", "LN_TUNING", "LORA", "TRAINABLE_TOKENS")
"""Values of `peft_type` without a family; their files are read without importing the families."""

FAMILIES: Registry[type[Family]] = Registry("PEFT family", __name__, "adapterkit.peft_families", Family, several=True)


def family_of(update: Update) -> type[Family] | None:
    """Return the family that writes an update; None if the update's method has no family."""
    return family_of_method(type(update))


def family_of_method(method: type[Update] | None) -> type[Family] | None:
    """Return the family that writes the updates of a method; None if the method has no family."""
    return None if method is None or method in BESIDE else _by_method().get(method)


def family_of_type(peft_type: str) -> type[Family] | None:
    """Return the family of a `peft_type`; None if the `peft_type` has no family."""
    return None if peft_type in PEFT_TYPES else _by_type().get(peft_type)


@cache
def _by_method() -> dict[type[Update], type[Family]]:
    """Map each method to the family that writes it; if several families do, use the first by name."""
    return {method: family for family in reversed(list(FAMILIES.values())) for method in family.methods()}


@cache
def _by_type() -> dict[str, type[Family]]:
    return {family.peft_type: family for family in reversed(list(FAMILIES.values()))}
