"""Families that change single elements of a weight: Super-Tuning and SHiRA.

Super-Tuning: `supertuning_indices` [n] and `supertuning_values` [n]. The hybrid form also has a LoRA's factors A and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import WRITE_ADAPTERKIT, Unrepresentable, Unsupported
from ....io.lazy import DTYPES, Lazy, as_array, as_lazy
from ....methods.shira import SHiRA
from ....methods.supertuning import SuperTuning
from ..file import DecodedUpdate, File, Key, make
from ..patterns import exact_alpha
from . import Family, MethodFields, Parts, check_parts
from ._weights import check_size, side, unlike, weight_in

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue

SPARSE = {"supertuning_indices": "index", "supertuning_values": "values"}
HYBRID = SPARSE | {"supertuning_lora_A.weight": "A", "supertuning_lora_B.weight": "B"}
"""A map from the endings of keys to fields of the update, for the hybrid form."""


class SupertuningFields(MethodFields, frozen=True, kw_only=True):
    """The fraction of elements that are not trained, and the rank and alpha of an additional LoRA."""

    sparsity: float = 0.99
    r: int | None = None
    lora_alpha: float | None = None
    save_precomputed_indices: bool | None = True


class SuperTuningFamily(Family):
    """The family of the peft_type SUPERTUNING."""

    name = "supertuning"
    peft_type = "SUPERTUNING"
    method = SuperTuning
    parts = tuple(HYBRID)
    folds = ("B",)
    method_fields: ClassVar[type[MethodFields]] = SupertuningFields
    read: ClassVar[Mapping[str, str]] = {
        "save_precomputed_indices": "whether the file has the positions of the trained elements; if not, reading fails",
        "sparsity": "the number of trained elements is int(out * in * (1 - sparsity))",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "select_top": "how the positions were selected; the file contains the positions"
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "lora_dropout": 0.0, "save_precomputed_indices": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config = file.settings.method_fields
        if config.save_precomputed_indices is False:
            why = "the file omits the positions of the trained elements, and adapterkit cannot compute the positions "
            why += "from the base if several elements of a weight are equally large"
            raise Unsupported(
                why,
                where="save_precomputed_indices",
                cure="Save the adapter from PEFT with save_precomputed_indices=True",
            )
        fields = SPARSE if config.r is None else HYBRID
        check_parts(keys, fields)
        key = keys["supertuning_values"]
        shape = file.base_shape(f"{key.path}.weight")
        if shape is not None and len(shape) == 2:
            check_size(key, side(file.tensors[key], 0, 1), _count(shape[0] * shape[1], config.sparsity), "sparsity")
        if config.r is not None:
            low = keys["supertuning_lora_A.weight"]
            check_size(low, side(file.tensors[low], 0, 2), config.r, "r")
        scaling = (
            1.0 if config.r is None else (2 * config.r if config.lora_alpha is None else config.lora_alpha) / config.r
        )
        tensors = {fields[part]: file.tensors[key] for part, key in keys.items()}
        update = make("supertuning", tensors, scaling=float(scaling))
        return DecodedUpdate(key.path, update, {fields[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: SuperTuning) -> Parts:
        fields = SPARSE if update.A is None else HYBRID
        return {field: (part, as_lazy(update.tensors[field])) for part, field in fields.items()}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        hybrid = {path: update for path, update in cls.of_it(updates).items() if update.A is not None}
        if any(exact_alpha((int(u.A.shape[0]), float(u.scaling)), False) is None for u in hybrid.values()):
            return list(hybrid)
        return unlike({path: float(update.scaling) for path, update in hybrid.items()})

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next((update for update in cls.of_it(updates).values() if update.A is not None), None)
        if some is None:
            return {"r": None, "lora_alpha": None}
        r = int(some.A.shape[0])
        return {"r": r, "lora_alpha": exact_alpha((r, float(some.scaling)), False)}

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, JsonValue]:
        counts = {}
        for path, update in cls.of_it(updates).items():
            rows, columns = weight_in(base, path, "Super-Tuning's sparsity depends on the size of a weight")
            counts[path] = int(update.values.shape[0]), rows * columns
        return {**cls.numbers(updates), "sparsity": _sparsity(counts)}


def _count(size: int, sparsity: float) -> int:
    return int(size * (1 - sparsity))


def _sparsity(counts: Mapping[str, tuple[int, int]]) -> float:
    """Return a sparsity from which PEFT computes the right number of trained elements for every weight.

    `counts` maps each weight's path to (number of trained elements, number of all elements).

    Raises:
        Unrepresentable: no single sparsity yields the numbers of trained elements.
    """
    lower = max(1 - (count + 1) / size for count, size in counts.values())
    upper = min(1 - count / size for count, size in counts.values())
    for sparsity in (round((lower + upper) / 2, 3), (lower + upper) / 2):
        if sparsity >= 0 and all(_count(size, sparsity) == count for count, size in counts.values()):
            return sparsity
    items = [f"{path}: {count} of {size} elements" for path, (count, size) in counts.items()]
    raise Unrepresentable(
        "no single sparsity yields these numbers of trained elements",
        items=items,
        cure=WRITE_ADAPTERKIT,
    )


# SHiRA: `shira_indices` [2, n] contains the rows and columns of the changed elements. `shira_weight` [n] contains the
# changes of these elements.


FIELDS = {"shira_indices": "index", "shira_weight": "values"}
"""A map from the endings of keys to fields of the update."""


class SHiRAFamily(Family):
    """The family of the peft_type SHIRA."""

    name = "shira"
    peft_type = "SHIRA"
    method = SHiRA
    parts = tuple(FIELDS)
    harmless: ClassVar[Mapping[str, str]] = {
        "mask_type": "how the positions were selected; the file contains the positions",
        "random_seed": "how the positions were selected; the file contains the positions",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, FIELDS)
        key = keys["shira_weight"]
        shape = file.base_shape(f"{key.path}.weight")
        if shape is not None and len(shape) == 2:
            check_size(key, side(file.tensors[key], 0, 1), file.settings.r * sum(shape), "r")
        tensors = {"index": _whole_numbers(file.tensors[keys["shira_indices"]]), "values": file.tensors[key]}
        return DecodedUpdate(key.path, make("shira", tensors), {FIELDS[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: SHiRA) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        raise AssertionError("`numbers_at` replaces this method, because r depends on the base")

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, JsonValue]:
        path, update = next(iter(cls.of_it(updates).items()))
        return {
            "r": int(update.values.shape[0]) // sum(weight_in(base, path, "SHiRA's r depends on the size of a weight"))
        }


def _whole_numbers(indices: Lazy) -> Lazy:
    """Return positions as integers, because PEFT on Windows writes positions as floats."""
    if not indices.dtype.floating:
        return indices
    whole = DTYPES["I32"]
    return Lazy(indices.shape, whole, lambda: as_array(indices).astype(whole.numpy).tobytes())
