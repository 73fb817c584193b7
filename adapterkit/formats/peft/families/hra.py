"""HRA: `hra_u` [in * k, r]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import as_lazy
from ....methods.hra import HRA
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts, check_rank

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update

PART = "hra_u"


class HRAFields(Own, frozen=True, kw_only=True):
    """The form of the directions."""

    r: int = 8
    apply_GS: bool = False


class HraFamily(Family):
    """The family of the peft_type HRA."""

    peft_type = "HRA"
    method = HRA
    parts = (PART,)
    own: ClassVar[type[Own]] = HRAFields
    read: ClassVar[Mapping[str, str]] = {"apply_GS": "the directions are made orthogonal first"}
    fresh: ClassVar[Mapping[str, Any]] = {"apply_GS": False, "bias": "none", "init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        key, own = keys[PART], file.settings.own
        check_rank(key, file.tensors[key], own.r, axis=1)
        return Found(key.path, make("hra", {"u": file.tensors[key]}, gram_schmidt=own.apply_GS), {"u": key})

    @classmethod
    def encode(cls, update: HRA) -> Parts:
        return {"u": (PART, as_lazy(update.u))}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        some = next(iter(cls.of_it(updates).values()))
        return {"r": int(some.u.shape[1]), "apply_GS": some.gram_schmidt}
