"""RoAd: `road_theta` and `road_alpha`, both [out / 2], [out] or [2 * out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....io.lazy import as_lazy
from ....methods.road import RoAd
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update

FIELDS = {"road_theta": "theta", "road_alpha": "alpha"}
"""Part -> field of the update."""


class RoAdFields(Own, frozen=True, kw_only=True):
    """The variant, and the size of a group."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64


class RoadFamily(Family):
    """The family of the peft_type ROAD."""

    peft_type = "ROAD"
    method = RoAd
    parts = tuple(FIELDS)
    own: ClassVar[type[Own]] = RoAdFields
    read: ClassVar[Mapping[str, str]] = {
        "group_size": "how many outputs make a group",
        "variant": "road_1, road_2 or road_4: which entries of a pair's matrix share angle and scale",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        own, fields = file.settings.own, {FIELDS[part]: key for part, key in keys.items()}
        tensors = {field: file.tensors[key] for field, key in fields.items()}
        update = make("road", tensors, variant=int(own.variant[-1]), group=own.group_size)
        return Found(fields["theta"].path, update, fields)

    @classmethod
    def encode(cls, update: RoAd) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        some = next(iter(cls.of_it(updates).values()))
        return {"variant": f"road_{some.variant}", "group_size": some.group}
