"""Read and write MTL-LoRA for one task.

The tensors are `lora_A` `[r, in]`, `lora_B` `[n, out, r]`, `weights` `[n]` and `task_specific.values` `[r]`.
n is the number of B factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....core.adapter import Target, Updates
from ....errors import USE_ITS_CONFIG, ShapeMismatch, Unsupported
from ....io.lazy import Lazy, as_lazy
from ...peft.patterns import exact_alpha
from ..file import QKV, AdapterHubUpdate, base_family, make, role, take
from . import AdapterHubFamily, FamilyFields, Number, Size
from .lora import LoraFamily

if TYPE_CHECKING:
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubNaming, AdapterHubPart, Findings

KIND = "loras"
FIELDS = {"lora_A": "A", "lora_B": "B", "task_specific.values": "values", "weights": "weights"}
"""A map from slots to fields."""


class MtlFields(FamilyFields, frozen=True, kw_only=True):
    """The config fields that determine the meaning of the tensors."""

    r: Size = 8
    alpha: Number = 8
    composition_mode: str = "add"
    use_gating: bool | None = False
    use_dora: bool | None = False
    n_up_projection: Size = 1
    task_specific_matrix_type: str = "singular_values"
    weights_sharpness: Number = 0.05


class MtlLoraFamily(AdapterHubFamily):
    """The family `mtl_lora`."""

    methods = frozenset({"mtl_lora"})
    fields = MtlFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "`scaling = alpha / r`",
        "composition_mode": "`add`; other values are not supported",
        "n_up_projection": "the number of B factors",
        "r": "rank",
        "task_specific_matrix_type": "`singular_values`: a diagonal matrix; `linear`: not supported",
        "use_dora": "not supported",
        "use_gating": "not supported",
        "weights_sharpness": "the temperature of the softmax that weights the B factors",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        **LoraFamily.harmless,
        "attn_matrices": "lists the adapted matrices, which the keys already show",
        "vera_b": "MTL-LoRA does not use it",
        "vera_d": "MTL-LoRA does not use it",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        **LoraFamily.fresh,
        "architecture": "mtl_lora",
        "composition_mode": "add",
        "init_weights": "lora",
        "task_specific_matrix_type": "singular_values",
        "use_dora": False,
        "use_gating": False,
        "vera_b": None,
        "vera_d": None,
    }

    @classmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        fields = part.method_fields
        words = {"composition_mode": "add", "use_gating": False, "use_dora": False}
        words["task_specific_matrix_type"] = "singular_values"
        for name, known in words.items():
            if (getattr(fields, name) or False) != known:
                why = f"this version does not support MTL-LoRA with {name} = {str(getattr(fields, name))[:60]!r}"
                raise Unsupported(why, where=f"{part.at}.{name}", cure=f"Known: {known}")
        for path, slots in part.groups(KIND).items():
            tensors = take(part, slots, FIELDS)
            shape = tensors["B"].shape
            if len(shape) != 3 or (shape[0], shape[2]) != (fields.n_up_projection, fields.r):
                why = f"the shape {list(shape)} is not [{fields.n_up_projection}, outputs, {fields.r}]"
                raise ShapeMismatch(why, where=slots["lora_B"].text, cure=USE_ITS_CONFIG)
            update = make(
                "mtl_lora", tensors, scaling=fields.alpha / fields.r, sharpness=float(fields.weights_sharpness)
            )
            yield AdapterHubUpdate(Target(path, part.layout(path)), update, tuple(slots[slot] for slot in FIELDS))

    @classmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        for target, group in updates.items():
            for update in group:
                for slot, field in FIELDS.items():
                    yield naming.key(target.path, KIND, slot), as_lazy(update.tensors[field])

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        some: Any = next(iter(updates.values()))[0]
        roles = {role(target.path, base_family(updates, base) or "") or "" for target in updates}
        return {
            "alpha": exact_alpha((int(some.A.shape[0]), float(some.scaling)), rslora=False) or 0,
            "attn_matrices": [word for word in QKV if word in roles],
            "intermediate_lora": "intermediate" in roles,
            "n_up_projection": int(some.B.shape[0]),
            "output_lora": "output" in roles,
            "r": int(some.A.shape[0]),
            "selfattn_lora": not roles.isdisjoint(QKV),
            "weights_sharpness": float(some.sharpness),
        }

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        first = _settings_of(next(iter(updates.values()))[0])
        family = base_family(updates, base) or ""
        for target, group in updates.items():
            for position, update in enumerate(group):
                if target.stacked or target.rows is not None:
                    why = "it adapts experts or only some rows of a weight, which the adapters library cannot do"
                elif role(target.path, family) in (None, "qkv"):
                    why = "the adapters library is not known to adapt this layer; pass --base BASE (base=)"
                elif exact_alpha((_settings_of(update)[0], _settings_of(update)[2]), rslora=False) is None:
                    why = "no alpha yields its exact scaling"
                else:
                    why = (
                        ""
                        if _settings_of(update) == first and not position
                        else "its sizes or settings differ from the first update, or its module has another update"
                    )
                if why:
                    yield target, position, f"{update.method}: {why}"


def _settings_of(update: Update) -> tuple[int, int, float, float]:
    tensors, attributes = update.tensors, update.attributes
    return (
        int(tensors["A"].shape[0]),
        int(tensors["B"].shape[0]),
        float(attributes["scaling"]),
        float(attributes["sharpness"]),
    )
