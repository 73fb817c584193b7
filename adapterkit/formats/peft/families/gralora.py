"""GraLoRA: `gralora_A` [g, in / g, r], `gralora_B` [g, r, out / g]; hybrids have `gralora_A_general` and B's, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import as_lazy
from ....methods.gralora import GraLoRA
from ..alphas import exact_alpha
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts, check_parts
from ._weights import check_size, layout, not_linear, side, unlike

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue

BLOCKS = {"gralora_A": "A", "gralora_B": "B"}
HYBRID = BLOCKS | {"gralora_A_general.weight": "A_whole", "gralora_B_general.weight": "B_whole"}
"""A map from a word in the keys to the update's field."""


class GraLoRAFields(Own, frozen=True, kw_only=True):
    """The ranks, the number of blocks, and alpha."""

    alpha: float = 64
    gralora_k: int = 2
    hybrid_r: int = 0


class GraLoRAFamily(Family):
    """The family of the peft_type GRALORA."""

    peft_type = "GRALORA"
    method = GraLoRA
    parts = tuple(HYBRID)
    folds = ("B",)
    own: ClassVar[type[Own]] = GraLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / (r + hybrid_r)",
        "gralora_k": "number of blocks along each axis",
        "hybrid_r": "rank of the LoRA in addition to the blocks; 0 for none",
    }
    harmless: ClassVar[Mapping[str, str]] = {"gralora_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "gralora_dropout": 0.0, "init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own, r = file.settings.own, file.settings.r
        fields = HYBRID if own.hybrid_r else BLOCKS
        check_parts(keys, fields)
        key = keys["gralora_A"]
        check_size(key, side(file.tensors[key], 0, 3), own.gralora_k, "gralora_k")
        check_size(key, side(file.tensors[key], 2, 3), r, "r")
        if own.hybrid_r:
            whole = keys["gralora_A_general.weight"]
            check_size(whole, side(file.tensors[whole], 0, 2), own.hybrid_r, "hybrid_r")
        tensors = {fields[part]: file.tensors[key] for part, key in keys.items()}
        update = make("gralora", tensors, scaling=own.alpha / (r + own.hybrid_r))
        return Found(key.path, update, {fields[part]: key for part, key in keys.items()}, layout(file, key.path))

    @classmethod
    def encode(cls, update: GraLoRA) -> Parts:
        fields = BLOCKS if update.A_whole is None else HYBRID
        return {field: (part, as_lazy(update.tensors[field])) for part, field in fields.items()}

    @classmethod
    def why_not(cls, target: Target, update: GraLoRA) -> str:
        return not_linear(target, update.method)

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        plain = {path: update for path, update in cls.of_it(updates).items() if update.A_whole is None}
        if any(exact_alpha((int(u.A.shape[2]), float(u.scaling)), False) is None for u in plain.values()):
            return list(plain)
        return unlike({path: float(update.scaling) for path, update in plain.items()})

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        forms = Counter(_form(update) for update in cls.of_it(updates).values())
        g, r, hybrid, scaling = forms.most_common(1)[0][0]
        turned = any(target.layout == "in out *k" for target in updates)
        fields = {"gralora_k": g, "r": r, "hybrid_r": hybrid, "fan_in_fan_out": turned}
        return fields | {"alpha": exact_alpha((r + hybrid, scaling), False) or scaling * (r + hybrid)}


def _form(update: GraLoRA) -> tuple[int, int, int, float]:
    hybrid = 0 if update.A_whole is None else int(update.A_whole.shape[0])
    return int(update.A.shape[0]), int(update.A.shape[2]), hybrid, float(update.scaling)
