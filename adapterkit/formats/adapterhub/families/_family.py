"""A family: the fields of one `architecture`, and functions between its keys and updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

if TYPE_CHECKING:
    from ....core.adapter import Target, Updates
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ..config import Settings
    from ..file import Findings, Naming, Part

Number = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)] | float
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a config that a family reads, with the library's defaults."""


class Family(ABC):
    """One `architecture`. Subclass it in a module of its own, whose name is the architecture's.

    Class attributes:
        methods: names of the methods that it reads and writes.
        fields: the fields of its config that change what its tensors mean.
        read: those fields, with what they do.
        harmless: fields that change nothing, with the reason.
        fresh: a config that never was AdapterHub's.
    """

    methods: ClassVar[frozenset[str]]
    fields: ClassVar[type[Fields]] = Fields
    read: ClassVar[Mapping[str, str]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}
    fresh: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def settle(cls, fields: Any, settings: Settings) -> Any:
        """The fields as the release that wrote them meant them."""
        return fields

    @classmethod
    @abstractmethod
    def decode(cls, part: Part) -> Findings:
        """All its updates in a file.

        Raises:
            Malformed: a tensor lacks its partners.
            ShapeMismatch: shapes disagree with the config.
            Unsupported: it needs what this version does not know.
        """

    @classmethod
    @abstractmethod
    def spell(cls, updates: Updates, naming: Naming) -> Iterator[tuple[str, Lazy]]:
        """Key and tensor of all that a file holds of these updates, all of this family."""

    @classmethod
    @abstractmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, Any]:
        """The fields of a config that says these updates, but for those that `fresh` has already."""

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        """Target, position among its updates and reason, for each of these that a file cannot say."""
        return iter(())

    @classmethod
    def stale(cls, updates: Updates, naming: Naming, kept: Mapping[str, Lazy]) -> Iterator[str]:
        """Keys of tensors that only travel along and no longer go with these updates."""
        return iter(())
