"""DeLoRA: `delora_A` [r, in], `delora_B` [out, r], `delora_lambda` [1], `delora_w_norm` [in]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import as_lazy
from ....methods.delora import DeLoRA
from ..file import File, Found, Key, make
from ._family import Family, Parts, check_parts, check_rank, scaled_numbers

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update

FIELDS = {"delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": "w_norm"}
"""Part -> field of the update."""


class DeLoRAFamily(Family):
    """The family of the peft_type DELORA."""

    peft_type = "DELORA"
    method = DeLoRA
    parts = tuple(FIELDS)
    harmless: ClassVar[Mapping[str, str]] = {
        "delora_lambda": "initial value of a tensor",
        "lambda_pattern": "initial values of a tensor",
        "module_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True, "module_dropout": 0.0}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        key = keys["delora_A"]
        check_rank(key, file.tensors[key], file.settings.rank(key.path))
        tensors = {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        return Found(key.path, make("delora", tensors), {FIELDS[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: DeLoRA) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        ranks = {path: (int(update.A.shape[0]), 1.0) for path, update in cls.of_it(updates).items()}
        fields = scaled_numbers(ranks)
        return {name: fields[name] for name in ("r", "rank_pattern")}
