"""Compose configs that are tried when a file is written; the first is most similar to the source config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...io.lazy import as_lazy
from ...methods.ia3 import IA3
from ...methods.replacement import Replacement
from ...methods.rows import Rows
from .experts import as_written
from .families import family_of_type
from .hints import PeftHints, fingerprint
from .pairs import PAIRS, law_fields
from .patterns import matches
from .spelling import config_name, is_embedding, is_parameter, lora_paths

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue
    from .families import Family

FRESH: dict[str, dict[str, Any]] = {
    "LORA": {"bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0},
    "IA3": {"fan_in_fan_out": False, "init_ia3_weights": True},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {"init_weights": True},
}
"""Config fields for adapters not read from PEFT's format.

Fields that older releases lack have PEFT's default values.
"""

DROPOUTS = (
    "boft_dropout", "hira_dropout", "lora_dropout", "miss_dropout", "rank_dropout", "vera_dropout",
)  # fmt: skip
"""The names of the config field for dropout in training; the name depends on the `peft_type`."""

COMMON = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "revision": None,
    "task_type": None,
}
"""The fields that all types have. If the type changes, the values stay, except `inference_mode`."""

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
    """Return a config with changes.

    New fields without a value are omitted: older releases of PEFT may not know them.
    """
    return {**config, **{name: value for name, value in changes.items() if value or name in config or name in ALWAYS}}


def _base_fields(adapter: Adapter, hints: PeftHints) -> dict[str, JsonValue]:
    """Return the fields that name the base; empty if the base is unknown or the source config already names it."""
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
    """Whether at least one linear layer among the targets is stored as [in, out]."""
    paths = lora_paths(updates)
    return any(
        target.layout == "in out *k"
        and (target.path in paths or any(isinstance(u, IA3) for u in found))
        and not is_embedding(target)
        for target, found in updates.items()
    )


# Create the lists of names in a config such that PEFT selects exactly the modules that have tensors in the file.


NO_MODULE = "dummy-target-modules"
"""PEFT's value of `target_modules` for a LoRA config that selects no module."""


def lora_fields(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields of a LORA config that select modules, parameters, biases and tokens."""
    paths = lora_paths(updates)
    targets = [target for target in updates if target.path in paths]
    parameters = [t.path for t in targets if is_parameter(t, paths, base)]
    modules = sorted({config_name(t, paths) for t in targets if t.path not in parameters})
    tokens = {target.path: token_numbers(target, updates) for target in updates if _has(updates[target], Rows)}
    biases = [target for target, found in updates.items() if _only_bias(found)]
    return {
        "target_modules": endings(modules, base) if modules or parameters else NO_MODULE,
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": saved_modules(updates, modules, base),
        "trainable_token_indices": tokens or None,
        "bias": "none" if not biases else "lora_only" if all(t.path in paths for t in biases) else "all",
        **_ANYWHERE,
    }


def ia3_fields(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields of an IA3 config that select all modules, and the modules whose inputs are scaled."""
    found = {target.path: update for target, us in updates.items() for update in us if isinstance(update, IA3)}
    inputs = sorted(path for path, update in found.items() if update.l_in is not None)
    loose = any(path.endswith(tuple(inputs)) for path in found if path not in inputs)
    return {
        "target_modules": _pattern(sorted(found)) if loose else endings(sorted(found), base),
        "feedforward_modules": _pattern(inputs) if loose else inputs,
        "modules_to_save": saved_modules(updates, sorted(found), base),
        "exclude_modules": None,
    }


def family_fields(updates: Updates, family: type[Family], base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields that select modules, for a config of one of the `families`."""
    paths = sorted(target.path for target, found in updates.items() if _has(found, family.methods()))
    if not family.names_modules:
        saved = saved_modules(updates, (), base)
        pair = base is not None and (base.config or {}).get("is_encoder_decoder")
        fields: dict[str, JsonValue] = {"modules_to_save": saved} if saved else {}
        return fields | ({"task_type": "SEQ_2_SEQ_LM"} if pair else {})
    return {
        "target_modules": endings(paths, base),
        "modules_to_save": saved_modules(updates, paths, base),
        **_ANYWHERE,
    }


def copy_fields(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields that select the modules whose copies are in an LN_TUNING file."""
    held = {
        f"{target.path}." if base is None or f"{target.path}.weight" in base.tensors else target.path
        for target in updates
    }
    return {
        "target_modules": endings(sorted({name.rpartition(".")[0] for name in held}), base),
        "exclude_modules": None,
    }


def token_fields(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields that select the tokens and modules of a TRAINABLE_TOKENS file."""
    paths = {target.path: token_numbers(target, updates) for target in updates if _has(updates[target], Rows)}
    return {"target_modules": endings(sorted(paths), base), "token_indices": next(iter(paths.values()))}


def token_numbers(target: Target, updates: Updates) -> list[int]:
    """Return the ids of the tokens whose rows a target changes."""
    rows = next(update for update in updates[target] if isinstance(update, Rows))
    return [int(number) for number in as_lazy(rows.index).numpy()]


def endings(modules: Collection[str], base: Checkpoint | None) -> list[str] | str:
    """Return a list of full paths. If a path is also the end of another module's name, return a pattern instead."""
    return _pattern(modules) if _also_end_so(modules, base) else sorted(modules)


def saved_modules(updates: Updates, adapted: Iterable[str], base: Checkpoint | None) -> list[str] | None:
    """Return `modules_to_save`: the modules that are replaced completely.

    PEFT loads other replaced parameters by name.
    """
    whole = [
        target.path
        for target, found in updates.items()
        if all(isinstance(update, Replacement) for update in found) and not _only_bias(found)
        and _is_whole(target.path, found, base)
    ]  # fmt: skip
    hidden = [path for path in whole if any(matches(rf"(^|.*\.){path}($|\..*)", other) for other in adapted)]
    return sorted(set(whole) - set(hidden)) or None


def _is_whole(path: str, found: Sequence[Update], base: Checkpoint | None) -> bool:
    """Whether updates replace exactly the module's tensors, and no other module's name in the base ends with `path`."""
    if base is None:
        return True
    held = {name for name in base.tensors if name.startswith(f"{path}.")}
    ends_so = any(name.rpartition(".")[0].endswith(path) for name in base.tensors if name not in held)
    return not ends_so and held == {f"{path}.{field}" for update in found for field in update.tensors}


def _also_end_so(modules: Collection[str], base: Checkpoint | None) -> bool:
    named = set(modules)
    last = {name.rpartition(".")[2] for name in named}
    held: set[str] = set()
    for name in () if base is None else base.tensors:
        # Visit each parent only once, because many modules have the same parent.
        while (name := name.rpartition(".")[0]) and name not in held:
            held.add(name)
            if name.rpartition(".")[2] in last and name not in named and any(end in named for end in _ends(name)):
                return True
    return False


def _ends(name: str) -> Iterator[str]:
    """Yield the part of a name after each of its dots."""
    while rest := name.partition(".")[2]:
        yield (name := rest)


def _pattern(modules: Iterable[str]) -> str:
    return "|".join(re.escape(module) for module in modules)


def _has(found: tuple[object, ...], method: type | tuple[type, ...]) -> bool:
    return any(isinstance(update, method) for update in found)


def _only_bias(found: tuple[object, ...]) -> bool:
    return any(isinstance(update, Replacement) and update.weight is None for update in found)


_ANYWHERE = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
