"""Families of tensors, one module each, found by listing: a `peft_type`, its parts of keys, its fields, both ways.

LoRA, DoRA, IA3, token rows and whole parameters share modules and are beside this package, not in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....registry import Registry
from ._family import Family, Parts

if TYPE_CHECKING:
    from ....updates import Update

__all__ = ["FAMILIES", "Family", "Parts", "family_of", "family_of_type"]

FAMILIES: Registry[type[Family]] = Registry("PEFT family", __name__, "adapterkit.peft_families", Family)


def family_of(update: Update) -> type[Family] | None:
    """The family that writes an update; None where it is not of one."""
    return next((family for family in FAMILIES.values() if type(update) is family.method), None)


def family_of_type(peft_type: str) -> type[Family] | None:
    """The family of a `peft_type`; None where there is none."""
    return next((family for family in FAMILIES.values() if family.peft_type == peft_type), None)
