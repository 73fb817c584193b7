"""The result of mapping names: where each part of a target lies in a base, and by which rules it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import TargetNotFound
from .architectures import QKV, Place


class PathPart(NamedTuple):
    """The rows of a fused weight that belong to one of its parts.

    Attributes:
        number: the number of the part, from 0.
        of: how many equal parts there are.
        interleaved: the part has every `of`-th row from row `number` on; otherwise it is one run of rows.
        heads: the parts are all queries, all keys and all values, with unequal sizes that follow from the base's heads.
        groups: only with `heads`: rows stand group by group: the queries that share a key, the key, the value.
    """

    number: int
    of: int
    interleaved: bool = False
    heads: bool = False
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """The place of one part of a target in the base.

    Attributes:
        path: the name in the base.
        take: the part of the target's rows that goes there; None for all.
        into: the part of the rows there that it becomes; None for all.
        expert: the slice of a target that is a stack; None for all of it.
        slot: the slice of a stack in the base; None for all of it.
        turn: places, without their names, with the order of the rows in the adapter and in the base; None if both are
            the same.
    """

    path: str
    take: PathPart | None = None
    into: PathPart | None = None
    expert: int | None = None
    slot: int | None = None
    turn: tuple[Place, Place] | None = None

    @property
    def plain(self) -> bool:
        """Whether the move only changes the name."""
        return (self.take, self.into, self.expert, self.slot, self.turn) == (None, None, None, None, None)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that was used.

    Attributes:
        kind: `user`, `exact`, `wrapper`, `architecture` or `prefix`.
        text: the rule in words; empty for `exact`.
        targets: how many targets it placed.
    """

    kind: str
    text: str
    targets: int

    def __str__(self) -> str:
        return f"{self.kind} {self.text}".strip()


@dataclass(slots=True)
class Resolution:
    """The map from an adapter to a base.

    Attributes:
        moves: name in the adapter -> the places of its parts.
        missing: names without a place.
        rules: the rules that were used, in the order in which they were tried.
        prefixes: the changes of prefixes among them, as (removed, added).
    """

    moves: dict[str, tuple[Move, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    prefixes: list[tuple[str, str]] = field(default_factory=list)


def part_of(place: Place) -> PathPart | None:
    """Return the part of a tensor that a place is; None if it is the whole tensor."""
    if place.qkv is not None:
        return PathPart(QKV.index(place.qkv), len(QKV), heads=True, groups=place.groups)
    if place.part is None or place.of is None:
        return None
    return PathPart(place.part, place.of, place.interleaved)


def ambiguous(target: str, readings: Sequence[str]) -> TargetNotFound:
    """Return the error for a target with several readings; it names them and the option that decides."""
    shown = " or ".join(sorted(readings)[:4])
    return TargetNotFound(
        f"two readings fit: it could be {shown}", where=target,
        cure=f"Say which with --rename '{target}={sorted(readings)[0]}' (rename=), or by a shorter prefix of both",
    )  # fmt: skip
