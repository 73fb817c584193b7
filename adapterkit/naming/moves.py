"""The result of mapping names: where a base has each part of a target, and the rules that found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import TargetNotFound
from .architectures import QKV, Place


class PathPart(NamedTuple):
    """The rows of a fused weight that belong to one of its parts.

    Attributes:
        number: the number of the part, counted from 0.
        of: the number of equal parts.
        interleaved: whether the part has every `of`-th row, starting at row `number`, instead of one run of rows.
        heads: whether the parts are all queries, all keys and all values, whose sizes depend on the base's heads.
        groups: whether rows are ordered by groups: the queries that share a key, the key, the value. Only with `heads`.
    """

    number: int
    of: int
    interleaved: bool = False
    heads: bool = False
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """The destination of one part of a target in the base.

    Attributes:
        path: the name in the base.
        take: the part of the target's rows that moves; None for all rows.
        into: the part of the destination's rows that these rows become; None for all rows.
        expert: if the target is a stack, the index of the slice that moves; None for the whole target.
        slot: if the destination is a stack, the index of its slice; None for the whole destination.
        turn: two places without names: the first has the order of rows in the adapter, the second the order in the
            base. None if the orders are the same.
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
        targets: the number of targets that the rule mapped.
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
        moves: the destinations of a target's parts, by the name in the adapter.
        missing: the names that the base does not have.
        rules: the rules that were used, in the order in which they were tried.
        prefixes: the changes of prefixes among the rules, as (removed, added).
    """

    moves: dict[str, tuple[Move, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    prefixes: list[tuple[str, str]] = field(default_factory=list)


def part_of(place: Place) -> PathPart | None:
    """Return the part of a tensor that a place describes; None for the whole tensor."""
    if place.qkv is not None:
        return PathPart(QKV.index(place.qkv), len(QKV), heads=True, groups=place.groups)
    if place.part is None or place.of is None:
        return None
    return PathPart(place.part, place.of, place.interleaved)


def ambiguous(target: str, readings: Sequence[str]) -> TargetNotFound:
    """Return the error for a target with several readings; it names the readings, and the option that selects one."""
    shown = " or ".join(sorted(readings)[:4])
    return TargetNotFound(
        f"the name has several readings in the base: {shown}", where=target,
        cure=f"Choose one with --rename '{target}={sorted(readings)[0]}' (rename=), or with a shorter prefix",
    )  # fmt: skip
