"""OSF: `osf_svd_params.U_low` [out, r], `osf_svd_params.S_low` [r], `osf_svd_params.V_low` [r, in]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.osf import OSF
from ..file import File, Found, Key, make
from ..patterns import exactly, finds
from ._family import Family, Own, Parts, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue

FIELDS = {"osf_svd_params.U_low": "U", "osf_svd_params.S_low": "S", "osf_svd_params.V_low": "V"}
"""A map from a word in the keys to the update's field."""

Rank = int | float | None


class OSFFields(Own, frozen=True, kw_only=True):
    """The number or the fraction of singular values that stay frozen."""

    effective_rank: Rank = None
    rank_pattern: dict[str, int | float] | None = None

    def kept(self, name: str, all_: int) -> int:
        """Return how many of a module's singular values stay frozen."""
        patterns = self.rank_pattern or {}
        value = next((value for pattern, value in patterns.items() if finds(pattern, name)), self.effective_rank)
        if value is None:
            return all_ // 2
        share = isinstance(value, float) and 0 < value <= 1
        return max(min(int(all_ * value) if share else int(value), all_), 0)


class OsfFamily(Family):
    """The family of the peft_type OSF."""

    peft_type = "OSF"
    method = OSF
    parts = tuple(FIELDS)
    own: ClassVar[type[Own]] = OSFFields
    read: ClassVar[Mapping[str, str]] = {
        "effective_rank": "number or fraction of singular values that stay frozen, half by default; or rank_pattern",
    }
    harmless: ClassVar[Mapping[str, str]] = {"target_svd_config": "PEFT does not use it"}
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        fields = {FIELDS[part]: key for part, key in keys.items()}
        update = make("osf", {field: file.tensors[key] for field, key in fields.items()})
        dims: Any = update.dims()
        all_, key = min(dims["out"], dims["in"]), fields["S"]
        kept = file.settings.own.kept(key.path, all_)
        if kept + dims["r"] != all_ or not kept:
            why = f"the file has {dims['r']} of {all_} singular values, but by the config {kept} stay in the base"
            raise ShapeMismatch(why, where=key.text, cure="The config does not belong to this file")
        return Found(key.path, update, fields)

    @classmethod
    def encode(cls, update: OSF) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def why_not(cls, target: Target, update: OSF) -> str:
        if update.S_own is not None:
            return "this osf stores the part to subtract, but PEFT computes it from the base"
        return super().why_not(target, update) or (
            "" if _kept(update) else "this osf has all singular values; PEFT keeps some in the base"
        )

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        kept = {path: _kept(update) for path, update in cls.of_it(updates).items()}
        common = Counter(kept.values()).most_common(1)[0][0]
        others = {exactly(path): count for path, count in kept.items() if count != common}
        return {"effective_rank": common, "rank_pattern": others or None}


def _kept(update: OSF) -> int:
    return int(min(update.U.shape[0], update.V.shape[1]) - update.S.shape[0])
