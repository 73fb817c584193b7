"""Families of tensors, one module each, found by listing: a `peft_type`, its parts of keys, its fields, both ways.

LoRA, DoRA, IA3, token rows and whole parameters share modules and are beside this package, not in it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ....registry import Registry
from ._family import Family, Parts

if TYPE_CHECKING:
    from ....updates import Update

__all__ = ["FAMILIES", "Family", "Parts", "family_of", "family_of_type"]

FAMILIES: Registry[type[Family]] = Registry("PEFT family", __name__, "adapterkit.peft_families", Family)


def family_of(update: Update) -> type[Family] | None:
    """The family that writes an update; None where it is not of one."""
    return _by_method().get(type(update))


def family_of_type(peft_type: str) -> type[Family] | None:
    """The family of a `peft_type`; None where there is none."""
    return _by_type().get(peft_type)


@cache
def _by_method() -> dict[type[Update], type[Family]]:
    """Where several write one method, the first by name does."""
    return {family.method: family for family in reversed(list(FAMILIES.values()))}


@cache
def _by_type() -> dict[str, type[Family]]:
    return {family.peft_type: family for family in reversed(list(FAMILIES.values()))}
