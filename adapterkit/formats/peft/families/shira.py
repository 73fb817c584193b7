"""SHiRA: `shira_indices` [2, n], which are rows and columns, and `shira_weight` [n]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import DTYPES, Lazy, as_array, as_lazy
from ....methods.shira import SHiRA
from ..file import File, Found, Key, make
from ._family import Family, Parts, check_parts
from ._weights import check_size, side, weight_in

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue

FIELDS = {"shira_indices": "index", "shira_weight": "values"}
"""A map from a word in the keys to the update's field."""


class SHiRAFamily(Family):
    """The family of the peft_type SHIRA."""

    peft_type = "SHIRA"
    method = SHiRA
    parts = tuple(FIELDS)
    harmless: ClassVar[Mapping[str, str]] = {
        "mask_type": "which positions were selected; they are in the file",
        "random_seed": "which positions were selected; they are in the file",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        key = keys["shira_weight"]
        shape = file.base_shape(f"{key.path}.weight")
        if shape is not None and len(shape) == 2:
            check_size(key, side(file.tensors[key], 0, 1), file.settings.r * sum(shape), "r")
        tensors = {"index": _whole_numbers(file.tensors[keys["shira_indices"]]), "values": file.tensors[key]}
        return Found(key.path, make("shira", tensors), {FIELDS[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: SHiRA) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        raise AssertionError("numbers_at replaces this method, because r depends on the base")

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, object]:
        path, update = next(iter(cls.of_it(updates).items()))
        return {
            "r": int(update.values.shape[0]) // sum(weight_in(base, path, "SHiRA's r depends on the sizes of a weight"))
        }


def _whole_numbers(indices: Lazy) -> Lazy:
    """Return positions as integers; PEFT writes them as floats on Windows."""
    if not indices.dtype.floating:
        return indices
    whole = DTYPES["I32"]
    return Lazy(indices.shape, whole, lambda: as_array(indices).astype(whole.numpy).tobytes())
