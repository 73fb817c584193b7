"""Describe the result of mapping names: where each target's parts are in the base, and which rules were used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import TargetNotFound
from .architectures import QKV, Place


class PathPart(NamedTuple):
    """Some rows of a fused weight: the rows of one of its parts.

    Attributes:
        number: the number of the part, counted from 0.
        of: the number of equal parts.
        interleaved: whether the part consists of every `of`-th row, starting at row `number`, instead of consecutive
            rows.
        heads: whether the three parts are queries, keys and values; their sizes depend on the base's numbers of heads.
        groups: whether rows are ordered by groups: the queries that share a key, the key, the value. Only with `heads`.
    """

    number: int
    of: int
    interleaved: bool = False
    heads: bool = False
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """The location in the base of one part of a target.

    Attributes:
        path: the name in the base.
        take: the rows of the target that belong to this part; None for all rows.
        into: the rows of the base's weight that correspond to them; None for all rows.
        expert: if the target is a stack but the base has single experts: the expert's index in the target. Otherwise
            None.
        slot: if the base has a stack but the target is a single expert: the expert's index in the base. Otherwise None.
        turn: the order of rows in the adapter and the order in the base, as two `Place` objects without names. None if
            the orders are equal.
    """

    path: str
    take: PathPart | None = None
    into: PathPart | None = None
    expert: int | None = None
    slot: int | None = None
    turn: tuple[Place, Place] | None = None

    @property
    def plain(self) -> bool:
        """Whether only the name differs."""
        return (self.take, self.into, self.expert, self.slot, self.turn) == (None, None, None, None, None)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that mapped names, for reports.

    Attributes:
        kind: `user`, `exact`, `wrapper`, `architecture` or `prefix`.
        text: a text that describes the rule; empty for `exact`.
        targets: the number of targets that the rule mapped.
    """

    kind: str
    text: str
    targets: int

    def __str__(self) -> str:
        return f"{self.kind} {self.text}".strip()


@dataclass(slots=True)
class Resolution:
    """The result of mapping an adapter's names to a base.

    Attributes:
        moves: a map from each name in the adapter to the destinations of its parts in the base. There is one part,
            unless the base stores the target in several tensors.
        missing: the adapter's names that the base does not have.
        rules: the rules that were used, in the order in which they were tried.
        prefixes: the changes of prefix that were used, as (removed, added).
    """

    moves: dict[str, tuple[Move, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    prefixes: list[tuple[str, str]] = field(default_factory=list)


def part_of(place: Place) -> PathPart | None:
    """Return which rows of a tensor belong to the weight with this `Place`; None for all rows."""
    if place.qkv is not None:
        return PathPart(QKV.index(place.qkv), len(QKV), heads=True, groups=place.groups)
    if place.part is None or place.of is None:
        return None
    return PathPart(place.part, place.of, place.interleaved)


def ambiguous(target: str, readings: Sequence[str]) -> TargetNotFound:
    """Return an error for a name that can mean several names in the base.

    The error lists them and the option that selects one.
    """
    shown = " or ".join(sorted(readings)[:4])
    return TargetNotFound(
        f"the name can mean several modules of the base: {shown}", where=target,
        cure=f"Choose one with --rename '{target}={sorted(readings)[0]}' (rename=), or with a shorter prefix",
    )  # fmt: skip
