"""LoHa: `hada_w1_a` [out, r], `hada_w1_b` [r, in * k]; with a core `hada_t1`: [r, out] and [r, in]; also for 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import as_lazy
from ....methods.loha import LoHa
from ..file import File, Found, Key, make
from ._family import Family, Own, Scaled, check_parts, check_rank, inexact_alphas, scaled_numbers

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

PLAIN = {"hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b"}
CORED = PLAIN | {"hada_t1": "t1", "hada_w1_b": "w1_in", "hada_t2": "t2", "hada_w2_b": "w2_in"}
"""A map from a word in the keys to the update's field."""


class LohaFamily(Family):
    """The family of the peft_type LOHA."""

    peft_type = "LOHA"
    method = LoHa
    parts = tuple(CORED)
    own: ClassVar[type[Own]] = Scaled
    read: ClassVar[Mapping[str, str]] = {"alpha": "scaling = alpha / r"}
    harmless: ClassVar[Mapping[str, str]] = {
        "module_dropout": "training only",
        "rank_dropout": "training only",
        "use_effective_conv2d": "whether kernels have a core; the keys show it",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0}
    folds = ("w1_a",)

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        fields = CORED if "hada_t1" in keys or "hada_t2" in keys else PLAIN
        check_parts(keys, fields)
        some = keys["hada_w1_b"]
        check_rank(some, file.tensors[some], file.settings.rank(some.path))
        tensors = {fields[part]: _turned(part, file.tensors[key], fields) for part, key in keys.items()}
        update = make("loha", tensors, scaling=file.settings.own.scaling(file.settings, some.path))
        return Found(some.path, update, {fields[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: LoHa) -> dict[str, tuple[str, Lazy]]:
        fields = PLAIN if update.t1 is None else CORED
        return {field: (part, _turned(part, as_lazy(update.tensors[field]), fields)) for part, field in fields.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        cored = any(update.t1 is not None for update in cls.of_it(updates).values())
        return {**scaled_numbers(cls.scales(updates)), "use_effective_conv2d": cored}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        return inexact_alphas(cls.scales(updates))

    @classmethod
    def scales(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, tuple[int, float]]:
        """Return the rank and scaling of each update, by path."""
        found = cls.of_it(updates)
        return {path: (int(update.w1_a.shape[1]), float(update.scaling)) for path, update in found.items()}


def _turned(part: str, tensor: Lazy, fields: Mapping[str, str]) -> Lazy:
    """Transpose [out, r] to [r, out] or back, if there is a core; return other tensors unchanged."""
    if fields is PLAIN or part not in ("hada_w1_a", "hada_w2_a") or len(tensor.shape) != 2:
        return tensor
    return tensor.map(lambda values: values.T, tensor.shape[::-1])
