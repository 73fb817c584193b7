"""Define a family: the fields of one `architecture`, and functions that convert between keys and updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

if TYPE_CHECKING:
    from ....core.adapter import Target, Updates
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubNaming, AdapterHubPart, Findings
    from ..settings import Settings

Number = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)] | float
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """The config fields that a family reads, with the library's defaults."""


class AdapterHubFamily(ABC):
    """The family of one `architecture`. Each subclass has its own module, with the architecture's name.

    Class attributes:
        methods: the names of the methods that the family reads and writes.
        fields: the config fields that change what the tensors mean.
        read: the effects of these fields.
        harmless: the reasons why other fields have no effect.
        fresh: the config for an adapter that was not read from AdapterHub's format.
    """

    methods: ClassVar[frozenset[str]]
    fields: ClassVar[type[Fields]] = Fields
    read: ClassVar[Mapping[str, str]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}
    fresh: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def settle(cls, fields: Any, settings: Settings) -> Any:
        """Return the fields with today's names of values, if the release that wrote them used other names."""
        return fields

    @classmethod
    @abstractmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        """Yield the updates of this family in a file.

        Raises:
            Malformed: a tensor lacks its partners.
            ShapeMismatch: shapes contradict the config.
            Unsupported: the file needs a feature that this version does not have.
        """

    @classmethod
    @abstractmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        """Yield (key, tensor) for everything that a file stores for these updates, which all belong to this family."""

    @classmethod
    @abstractmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        """Return the config fields that express these updates, except the fields in `fresh`."""

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        """Yield (target, index of the update, reason) for each update that a file cannot express."""
        return iter(())

    @classmethod
    def stale(cls, updates: Updates, naming: AdapterHubNaming, kept: Mapping[str, Lazy]) -> Iterator[str]:
        """Yield the keys of kept tensors that no longer belong to these updates."""
        return iter(())
