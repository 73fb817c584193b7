"""Compose the configs that could be written; the ones most similar to the source config come first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...methods.ia3 import IA3
from .experts import as_written
from .families import family_of_type
from .hints import PeftHints, fingerprint
from .modules import copy_fields, family_fields, ia3_fields, lora_fields, token_fields
from .pairs import PAIRS, law_fields
from .spelling import is_embedding, lora_paths

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Updates
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue

FRESH: dict[str, dict[str, Any]] = {
    "LORA": {"bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0},
    "IA3": {"fan_in_fan_out": False, "init_ia3_weights": True},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {"init_weights": True},
}
"""Config fields for adapters that were not read from PEFT's format; fields that older PEFT lacks keep its defaults."""

DROPOUTS = (
    "boft_dropout", "hira_dropout", "lora_dropout", "miss_dropout", "rank_dropout", "vera_dropout",
)  # fmt: skip
"""The fields with the dropout of each type's layers in training."""

COMMON = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "revision": None,
    "task_type": None,
}
"""The fields of every config. If the type changes, all except `inference_mode` keep their values."""

ALWAYS = ("r", "lora_alpha", "target_modules", "feedforward_modules", "modules_to_save")
"""Fields that are written even if they are empty."""


def configs(
    adapter: Adapter,
    updates: Updates,
    hints: PeftHints,
    peft_type: str,
    numbers: Mapping[str, JsonValue],
    base: Checkpoint | None,
) -> Iterator[dict[str, JsonValue]]:
    """Yield the source config, then one with new ranks and alphas, then one that also has new lists of modules."""
    read = hints.config if hints.config.get("peft_type") == peft_type else {}
    if any(target.stacked for target in updates):
        read = as_written(read)
    named = _base_fields(adapter, hints)
    family = family_of_type(peft_type)
    as_read = bool(read) and hints.targets == fingerprint(updates)
    if as_read:
        yield read | named
    changed = family.numbers_at(updates, base) if family else numbers if peft_type == "LORA" else {}
    if as_read:
        yield _over(read | named, changed)
    common = {name: hints.config.get(name, value) for name, value in COMMON.items()} | {"inference_mode": True}
    fresh = family.fresh if family else FRESH[peft_type]
    dropout = [step.args["dropout"] for step in adapter.recipe if step.op == "create" and "dropout" in step.args]
    trained = {name: dropout[-1] for name in DROPOUTS if name in fresh and dropout}
    start = read or {**common, **fresh, **trained, "peft_type": peft_type}
    lists = _lists(updates, peft_type, base)
    yield _over(start | named, {**_law_fields(updates, peft_type, start), **changed, **lists})


def _lists(updates: Updates, peft_type: str, base: Checkpoint | None) -> dict[str, JsonValue]:
    if family := family_of_type(peft_type):
        return family_fields(updates, family, base)
    lists = {"LORA": lora_fields, "LN_TUNING": copy_fields, "IA3": ia3_fields, "TRAINABLE_TOKENS": token_fields}
    return lists[peft_type](updates, base)


def _over(config: Mapping[str, JsonValue], changes: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a config with changes; empty new fields are not added, because older releases of PEFT may lack them."""
    return {**config, **{name: value for name, value in changes.items() if value or name in config or name in ALWAYS}}


def _base_fields(adapter: Adapter, hints: PeftHints) -> dict[str, JsonValue]:
    """Return the base's name, if it differs from the name in the source config."""
    ref, read = adapter.base, hints.config.get("base_model_name_or_path")
    if ref is None or ref.id in (None, read):
        return {}
    return {"base_model_name_or_path": ref.id, "revision": ref.revision}


def _law_fields(updates: Updates, peft_type: str, before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    if peft_type != "LORA":
        return {"fan_in_fan_out": _stored_in_out(updates)} if peft_type == "IA3" else {}
    pairs = {t.path: update for t, found in updates.items() for update in found if isinstance(update, PAIRS)}
    return {**law_fields(pairs, before), "fan_in_fan_out": _stored_in_out(updates)}


def _stored_in_out(updates: Updates) -> bool:
    """Whether the linear layers among the targets are stored as [in, out]."""
    paths = lora_paths(updates)
    return any(
        target.layout == "in out *k"
        and (target.path in paths or any(isinstance(u, IA3) for u in found))
        and not is_embedding(target)
        for target, found in updates.items()
    )
