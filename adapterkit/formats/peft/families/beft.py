"""BEFT: `beft_bias` [1, out], added to the bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.dense import Dense
from ..file import File, Found, Key, make
from ._family import Family

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy

PART = "beft_bias"


class BeftFamily(Family):
    """The family of the peft_type BEFT."""

    peft_type = "BEFT"
    method = Dense
    parts = (PART,)
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        key = keys[PART]
        tensor = file.tensors[key]
        if len(tensor.shape) != 2 or tensor.shape[0] != 1:
            raise ShapeMismatch(f"{list(tensor.shape)} is not [1, out]", where=key.text, cure="Save it again with PEFT")
        return Found(key.path, make("dense", {"d": tensor.reshape(tensor.shape[1])}), {"d": key})

    @classmethod
    def encode(cls, update: Dense) -> dict[str, tuple[str, Lazy]]:
        return {} if update.d is None else {"d": (PART, as_lazy(update.d).reshape(1, -1))}

    @classmethod
    def why_not(cls, target: Target, update: Dense) -> str:
        if update.D is not None or update.scaling != 1:
            return "dense, but for a change of the bias with a scaling of 1"
        return super().why_not(target, update)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        return {}
