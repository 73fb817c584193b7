"""The families of AdapterHub's files, one for each `architecture`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from ....core.registry import Registry

if TYPE_CHECKING:
    from ....core.adapter import Target, Updates
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubNaming, AdapterHubPart, AdapterHubSettings, Findings


# Define the base class of families. A family has config fields, and converts tensors to updates and back.


Number = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)] | float
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


def count_in(config: Mapping[str, JsonValue] | None, names: Iterable[str]) -> int | None:
    """Return the first integer that a base's config has under one of these names; None if there is none."""
    values = (config.get(name) for name in names) if config is not None else ()
    return next((value for value in values if isinstance(value, int)), None)


class FamilyFields(msgspec.Struct, frozen=True, kw_only=True):
    """The config fields that a family reads, with the adapters library's defaults."""


class AdapterHubFamily(ABC):
    """Converts the tensors of one `architecture` to updates and back. A subclass's module has the architecture's name.

    Class attributes:
        methods: the names of the methods that the family reads and writes.
        fields: a struct with the config fields that change the meaning of the tensors.
        read: for each field in `fields`, a phrase that describes the field's effect.
        harmless: for each other known field, a phrase that says why the field has no effect.
        fresh: config fields that have the same value in every new config.
    """

    methods: ClassVar[frozenset[str]]
    fields: ClassVar[type[FamilyFields]] = FamilyFields
    read: ClassVar[Mapping[str, str]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}
    fresh: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def settle(cls, fields: Any, settings: AdapterHubSettings) -> Any:
        """Return the config fields. If a value is a name that old releases used, replace it with the current name."""
        return fields

    @classmethod
    @abstractmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        """Yield this family's updates in the file, and a `KeptKey` for each of the family's tensors that has no effect.

        Raises:
            Malformed: the file lacks some of an update's tensors.
            ShapeMismatch: the tensors' shapes contradict the config.
            Unsupported: the file needs a feature that this version does not have.
        """

    @classmethod
    @abstractmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        """Yield (key, tensor) for each tensor of these updates. All of the updates belong to this family."""

    @classmethod
    @abstractmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        """Return the config fields for these updates, except the fields in `fresh`."""

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        """Yield (target, index of the update, reason) for each update that a new config cannot express."""
        return iter(())

    @classmethod
    def stale(cls, updates: Updates, naming: AdapterHubNaming, kept: Mapping[str, Lazy]) -> Iterator[str]:
        """Yield the keys of those tensors in `kept` (tensors from the source file) that no longer fit these updates."""
        return iter(())


# Find the family of an `architecture`. Each family has its own module. Bottleneck configs have no `architecture`.


FAMILIES: Registry[type[AdapterHubFamily]] = Registry(
    "AdapterHub family", __name__, "adapterkit.adapterhub_families", AdapterHubFamily
)


def family_of(update: Update) -> type[AdapterHubFamily] | None:
    """Return the family that writes an update; None if no family has the update's method."""
    return next((family for family in FAMILIES.values() if update.method in family.methods), None)


def family_of_architecture(architecture: object) -> type[AdapterHubFamily] | None:
    """Return the family of an `architecture`; None if there is no such family.

    Bottleneck configs have no `architecture`. So for None, return the bottleneck family; for "bottleneck", return None.
    """
    if architecture is None:
        architecture = "bottleneck"
    elif architecture == "bottleneck":
        return None
    return FAMILIES[architecture] if isinstance(architecture, str) and architecture in FAMILIES else None
