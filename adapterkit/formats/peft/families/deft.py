"""DEFT: `deft_P` [out, r] and, unless `para`, `deft_R` [r, in]; r is at most the number of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....io.lazy import as_lazy
from ....methods.deft import DEFT
from ..alphas import exact_alpha
from ..file import File, Found, Key, make
from ._family import Family, Own, check_parts, check_rank
from ._weights import not_embedded

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

PARTS = {"deft_P": "P", "deft_R": "R"}


class DEFTFields(Own, frozen=True, kw_only=True):
    """The rank, the scaling and the formula."""

    r: int = 8
    alpha: float | None = None
    para: bool = False
    decomposition_method: Literal["relu", "qr"] = "relu"


class DeftFamily(Family):
    """The family of the peft_type DEFT."""

    peft_type = "DEFT"
    method = DEFT
    parts = tuple(PARTS)
    own: ClassVar[type[Own]] = DEFTFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / r, with the module's own r; 1 without alpha",
        "decomposition_method": "qr: P is made orthonormal; relu: P is used unchanged",
        "para": "whether the module has no R",
    }
    harmless: ClassVar[Mapping[str, str]] = {"deft_dropout": "training only", "init_scale": "initial values"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "deft_dropout": 0.0, "init_scale": 1.0, "init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own = file.settings.own
        check_parts(keys, ("deft_P",) if own.para else tuple(PARTS))
        key = keys["deft_P"]
        P = file.tensors[key]
        rank = min(own.r, P.shape[0]) if P.shape else own.r
        check_rank(key, P, rank, axis=1)
        fields = {PARTS[part]: found for part, found in keys.items()}
        tensors = {field: file.tensors[found] for field, found in fields.items()}
        made = make("deft", tensors, scaling=own.alpha / rank if own.alpha else 1.0)
        update = made.replace(orthogonal=own.decomposition_method == "qr")
        return Found(key.path, update, fields, "in out *k" if file.settings.fan_in_fan_out else "out *in")

    @classmethod
    def encode(cls, update: DEFT) -> dict[str, tuple[str, Lazy]]:
        return {field: (f"deft_{field}", as_lazy(leaf)) for field, leaf in update.tensors.items()}

    @classmethod
    def why_not(cls, target: Target, update: DEFT) -> str:

        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        found = cls.of_it(updates)
        some = max(found.values(), key=lambda update: int(update.P.shape[1]))
        scaled = next((u for u in found.values() if u.scaling != 1), None)
        turned = any(target.layout == "in out *k" and target.path in found for target in updates)
        return {
            "r": int(some.P.shape[1]),
            "alpha": None if scaled is None else exact_alpha((int(scaled.P.shape[1]), float(scaled.scaling)), False),
            "para": some.R is None,
            "decomposition_method": "qr" if some.orthogonal else "relu",
            "fan_in_fan_out": turned,
        }
