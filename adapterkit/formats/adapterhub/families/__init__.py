"""Find the family of an `architecture`. Each family has its own module. Bottleneck configs have no `architecture`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....core.registry import Registry
from ._family import AdapterHubFamily

if TYPE_CHECKING:
    from ....core.updates import Update

FAMILIES: Registry[type[AdapterHubFamily]] = Registry(
    "AdapterHub family", __name__, "adapterkit.adapterhub_families", AdapterHubFamily
)


def family_of(update: Update) -> type[AdapterHubFamily] | None:
    """Return the family that writes an update; None if AdapterHub's format lacks the update's method."""
    return next((family for family in FAMILIES.values() if update.method in family.methods), None)


def family_of_architecture(architecture: object) -> type[AdapterHubFamily] | None:
    """Return the family of an `architecture`; None if the architecture is unknown."""
    if architecture is None:
        architecture = "bottleneck"
    elif architecture == "bottleneck":
        return None
    return FAMILIES[architecture] if isinstance(architecture, str) and architecture in FAMILIES else None
