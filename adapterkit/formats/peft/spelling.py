"""Convert updates to keys and to tensors as PEFT stores them, and compose the config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

from ...core.metadata import DROPOUTS, dropouts_of
from ...io.lazy import Lazy, as_lazy
from ...methods.ia3 import IA3
from ...methods.lora import LoRA
from ...methods.replacement import Replacement
from ...methods.rows import Rows
from ...naming.moves import IN_OUT
from .decoders import norm_spelled
from .factors import as_written, depths, has_known_order, unstack
from .families import PAIRS, Family, Parts, family_of, family_of_type, formula_fields, from_blocks
from .file import PREFIX, PeftHints, fingerprint
from .patterns import matches

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue


# Convert updates to keys and to tensors as PEFT stores them. `file.parse_keys` does the inverse for keys.


EMBEDDINGS = ("*emb*", "*.wte", "wte", "*.wpe", "wpe", "*.shared", "shared")
"""Globs for the paths of embeddings. They distinguish embeddings from other targets that are stored as [in, out]."""


Part = tuple[str, str, Lazy, bool]
"""(field, key, tensor as PEFT stores it, whether the key is uncertain); see `Spelled`."""


@dataclass(frozen=True, slots=True, eq=False)
class Spelled:
    """One tensor as PEFT stores it.

    Attributes:
        place: (target, index of the update among the target's updates, field).
        key: the tensor's key.
        leaf: the tensor.
        guessed: whether the key is uncertain, because the target may be an embedding or a Conv1D, or because the order
            of a module's parameters is unknown.
    """

    place: tuple[Target, int, str]
    key: str
    leaf: Lazy
    guessed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PeftNames:
    """The data for creating the names of modules and parameters in PEFT's keys, for one set of updates.

    Attributes:
        paths: the paths of the targets with an update of a method in `PAIRS`.
        wrappers: a map from a module's path to the text that PEFT's wrappers insert after this path in keys, such as
            `.base_layer`.
        depths: a map from a parameter's path to the parameter's depth. PEFT wraps a module once for each of its adapted
            parameters. The depth is the number of wrappers around the parameter's wrapper.
        guessed: the paths of the parameters whose depth is uncertain.
        base: the base, or None.
    """

    paths: Collection[str]
    wrappers: Mapping[str, str]
    depths: Mapping[str, int]
    guessed: Collection[str]
    base: Checkpoint | None
    _inside: dict[str, str] = field(default_factory=dict)
    """A cache: maps a module's path to the path with the text of all wrappers, including the module's own wrapper."""

    def inside(self, name: str) -> str:
        """Insert the text of all parent modules' wrappers into a path. The last module's own wrapper is left out."""
        module, dot, last = name.rpartition(".")
        if not dot:
            return last
        wrapped = self._inside.get(module)
        if wrapped is None:
            wrapped = self._inside[module] = self.inside(module) + self.wrappers.get(module, "")
        return f"{wrapped}.{last}"


def spell(
    updates: Mapping[Target, tuple[Update, ...]], peft_type: str, prefix: str = PREFIX, base: Checkpoint | None = None
) -> Iterator[Spelled]:
    """Yield every tensor of the updates with its key.

    Updates of only some rows of a fused weight are skipped, because PEFT has no keys for such updates.
    """
    for target, position, parts in spell_updates(updates, peft_type, prefix, base):
        for name, key, leaf, guessed in parts:
            yield Spelled((target, position, name), key, leaf, guessed)


def spell_updates(
    updates: Mapping[Target, tuple[Update, ...]], peft_type: str, prefix: str = PREFIX, base: Checkpoint | None = None
) -> Iterator[tuple[Target, int, list[Part]]]:
    """Yield (target, index of the update among the target's updates, tensors with their keys) for each update.

    Updates of only some rows of a fused weight are skipped, because PEFT has no keys for such updates.
    """
    names = _names(updates, peft_type, base)
    encoded: dict[type[Family], Iterator[Parts]] = {}
    for target, group in updates.items():
        for position, update in enumerate(group):
            family = family_of(update)
            if family is None:
                parts: Parts = {}
            else:
                if family not in encoded:
                    encoded[family] = family.encode_all(updates, base)
                parts = next(encoded[family])
            if target.rows is not None:
                continue
            spelled = []
            for name, key, leaf, guessed in _spell_update(target, update, names, peft_type, parts):
                shared = family is not None and is_shared(family, key)
                whole = (family.shared_prefix if family and shared else prefix) + key
                spelled.append((name, whole, leaf, guessed))
            yield target, position, spelled


def are_plain(updates: Mapping[Target, tuple[Update, ...]]) -> bool:
    """Whether every update is a LoRA of a linear module, and no adapted module contains another one.

    If so, every key is `<prefix><path>.lora_A.weight` or `<prefix><path>.lora_B.weight`, and `spell_updates` is not
    needed. For an adapter with 10^5 keys (a mixture of experts), `spell_updates` took a fifth of the reading time.
    """
    paths: set[str] = set()
    for target, group in updates.items():
        path, update = target.path, group[0]
        if len(group) > 1 or type(update) is not LoRA or update.bias is not None or len(update.A.shape) != 2:
            return False
        if target.layout != "out *in" or target.rows is not None or path.endswith("weight"):
            return False
        paths.add(path)
    modules = paths
    while modules:
        modules = {path.rpartition(".")[0] for path in modules} - {""}
        if modules & paths:
            return False
    return True


def stored(leaf: Lazy, layout: str) -> Lazy:
    """Transpose the weight of a `Replacement` from [out, in] to the order of axes of `layout`, or back."""
    axis = int(layout.startswith("e "))
    if layout not in ("in out *k", "e in out *k") or len(leaf.shape) < axis + 2:
        return leaf
    shape = list(leaf.shape)
    shape[axis], shape[axis + 1] = shape[axis + 1], shape[axis]
    return leaf.map(lambda values: values.swapaxes(axis, axis + 1), tuple(shape))


def config_name(target: Target, paths: Collection[str]) -> str:
    """Return the name by which a config selects a target.

    If both projections of an attention module are targets, the name of both is the attention module's path. For every
    other target, the name is the target's path.
    """
    module, _, name = target.path.rpartition(".")
    other = _OTHER_PROJECTION.get(name)
    return module if module and other and f"{module}.{other}" in paths else target.path


def is_parameter(target: Target, paths: Collection[str], base: Checkpoint | None) -> bool:
    """Whether a LoRA's target is a parameter and not a module.

    If both projections of an attention module are targets, the config selects the attention module. The result is then
    False for both projections.
    """
    return (target.stacked or _names_parameter(target.path, base)) and config_name(target, paths) == target.path


def is_embedding(target: Target) -> bool | None:
    """Whether the target of a LoRA is an embedding; None if it may be an embedding or a Conv1D."""
    if target.layout != "in out *k":
        return False
    if any(fnmatchcase(target.path, glob) for globs in IN_OUT.values() for glob in globs):
        return False
    return True if any(fnmatchcase(target.path.lower(), glob) for glob in EMBEDDINGS) else None


def lora_paths(updates: Mapping[Target, tuple[Update, ...]]) -> set[str]:
    """Return the paths of the targets with LoRA, or with another method in `PAIRS`."""
    return {target.path for target, group in updates.items() if any(isinstance(u, PAIRS) for u in group)}


def _names_parameter(path: str, base: Checkpoint | None) -> bool:
    return path.endswith("weight") or (base is not None and path in base.tensors)


def _names(updates: Mapping[Target, tuple[Update, ...]], peft_type: str, base: Checkpoint | None) -> PeftNames:
    paths = lora_paths(updates)
    modules: dict[str, list[str]] = {}
    wrappers: dict[str, str] = {}
    for target, group in updates.items():
        module, _, name = target.path.rpartition(".")
        if target.path in paths and module and is_parameter(target, paths, base):
            modules.setdefault(module, []).append(name)
        elif any(isinstance(update, _WRAPPING) or family_of(update) for update in group):
            wrappers[config_name(target, paths)] = wrappers[target.path] = ".base_layer"
        elif any(isinstance(update, Rows) for update in group):
            wrappers[target.path] = _ROWS[peft_type == "TRAINABLE_TOKENS"] + ".base_layer"
    wrappers |= {module: ".base_layer" * len(names) for module, names in modules.items()}
    guessed = {f"{m}.{name}" for m, names in modules.items() for name in names if not has_known_order(names)}
    depth = {f"{module}.{name}": d for module, names in modules.items() for name, d in depths(names)}
    return PeftNames(paths, wrappers, depth, guessed, base)


def _spell_update(target: Target, update: Update, names: PeftNames, peft_type: str, parts: Parts) -> Iterator[Part]:
    if isinstance(update, PAIRS):
        embedding, stem = is_embedding(target), _stem(target, names)
        guessed = embedding is None or target.path in names.guessed
        for name, leaf in update.tensors.items():
            if name == "invocation":
                continue  # The invocation tokens are in the config, not in a tensor.
            key = f"{stem}.{_part(name, embedding or False)}"
            yield name, key, _factor(name, as_lazy(leaf), update, target.stacked), guessed
    elif isinstance(update, IA3):
        for name, leaf in update.tensors.items():
            yield name, f"{names.inside(target.path)}.ia3_l", _scales(name, as_lazy(leaf), target, names.base), False
    elif isinstance(update, Rows):
        wrapper = _ROWS[peft_type == "TRAINABLE_TOKENS"]
        key = f"{names.inside(target.path)}{wrapper}.trainable_tokens_delta"
        yield "values", key, as_lazy(update.values), False
    elif isinstance(update, Replacement):
        for name, leaf in update.tensors.items():
            whole = stored(as_lazy(leaf), target.layout) if name == "weight" else as_lazy(leaf)
            path = names.inside(_whole_name(target.path, name, names.base))
            yield name, norm_spelled(path) if peft_type == "LN_TUNING" else path, whole, False
    elif family := family_of(update):
        for name, (part, leaf) in parts.items():
            full_key = f"{names.inside(target.path)}.{part.removeprefix('.')}"
            key = part if is_shared(family, part) else full_key
            yield name, key, leaf, family.guesses(target)


def is_shared(family: type[Family], word: str) -> bool:
    """Whether `word` is the key, without its prefix, of a tensor that all modules share."""
    return any(fnmatchcase(word, pattern) for pattern in family.shared)


_OTHER_PROJECTION = {"in_proj_weight": "out_proj", "out_proj": "in_proj_weight"}
"""The two projections of `nn.MultiheadAttention`."""


def _stem(target: Target, names: PeftNames) -> str:
    """Return the module path in a LoRA's keys, including the text of PEFT's wrappers, such as `.base_layer`."""
    if target.path in names.depths:
        module = target.path.rpartition(".")[0]
        return names.inside(module) + ".base_layer" * names.depths[target.path]
    name = config_name(target, names.paths)
    return names.inside(target.path if target.path.endswith(".out_proj") else name)


@cache
def _part(field: str, embedding: bool) -> str:
    if field in ("magnitude", "diag"):
        return {"magnitude": "lora_magnitude_vector", "diag": "lora_diag"}[field]
    if field == "bias":
        return "lora_B.bias"
    field = field.removeprefix("idle_")
    return f"lora_embedding_{field}" if embedding else f"lora_{field[0]}.weight"


def _factor(field: str, leaf: Lazy, update: Update, stacked: bool) -> Lazy:
    if stacked:
        return unstack(leaf) if field == "B" else leaf.reshape(-1, leaf.shape[-1])
    if field.endswith("_blocks"):
        return from_blocks(leaf)
    A = getattr(update, "A", None)
    ones = [] if A is None else [1] * (len(A.shape) - 2)
    if not ones or field in ("A", "bias"):
        return leaf
    return leaf.reshape(*leaf.shape, *ones) if field == "B" else leaf.reshape(1, *leaf.shape, *ones)


def _scales(field: str, leaf: Lazy, target: Target, base: Checkpoint | None) -> Lazy:
    weight = None if base is None else base.tensors.get(f"{target.path}.weight")
    if weight is not None and len(weight.shape) > 2:
        return leaf.reshape(1, -1, *[1] * (len(weight.shape) - 2))
    return leaf.reshape(1, -1) if field == "l_in" else leaf.reshape(-1, 1)


def _whole_name(path: str, field: str, base: Checkpoint | None) -> str:
    """Return the name of the base's parameter that a `Replacement`'s field (`weight` or `bias`) replaces."""
    if not _names_parameter(path, base):
        return f"{path}.{field}"
    return path if field == "weight" else "bias".join(path.rsplit("weight", 1))


_WRAPPING = (*PAIRS, IA3)
_ROWS = (".token_adapter", "")
"""The two possible texts between a module's path and `.trainable_tokens_delta` in a key.

If a file's `peft_type` is TRAINABLE_TOKENS, its keys have the second text, which is empty. The keys of other files have
the first text.
"""

# Compose the configs that the writer tries. The first one is the most similar to the source config.


FRESH: dict[str, dict[str, Any]] = {
    "LORA": {"bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0},
    "IA3": {"fan_in_fan_out": False, "init_ia3_weights": True},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {"init_weights": True},
}
"""The config fields, by `peft_type`, to write for an adapter that was not read from PEFT's format.

Fields that older releases of PEFT do not know are left out, so PEFT uses its defaults for them.
"""

COMMON = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "revision": None,
    "task_type": None,
}
"""The config fields that every `peft_type` has, with the values for an adapter without a source config.

If the written file has another `peft_type` than the source file, these fields keep the source config's values, except
that `inference_mode` becomes True.
"""

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
    """Yield the configs to try, the most similar to the source config first.

    If the adapter still has the source's targets and `peft_type`, there are three configs. The first is the source
    config with the current base. The second also has new ranks and alphas. The third also has new lists of modules.
    For any other adapter, only the third is yielded.
    """
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
    dropouts = set(dropouts_of(adapter))
    # A config has one dropout. An adapter that was combined from adapters with several dropouts gets PEFT's default.
    trained = {name: dropout for name in DROPOUTS if name in fresh for dropout in dropouts if len(dropouts) == 1}
    start = read or {**common, **fresh, **trained, "peft_type": peft_type}
    if family:
        lists = family_fields(updates, family, base)
    else:
        fields = {"LORA": lora_fields, "LN_TUNING": copy_fields, "IA3": ia3_fields, "TRAINABLE_TOKENS": token_fields}
        lists = fields[peft_type](updates, base)
    yield _over(start | named, {**_formula_fields(updates, peft_type, start), **changed, **lists})


def _over(config: Mapping[str, JsonValue], changes: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a config with changed fields.

    A new field that is empty or false is left out, because older releases of PEFT may not know the field. The fields in
    `ALWAYS` are never left out.
    """
    return {**config, **{name: value for name, value in changes.items() if value or name in config or name in ALWAYS}}


def _base_fields(adapter: Adapter, hints: PeftHints) -> dict[str, JsonValue]:
    """Return the fields that name the base; none if the base is unknown, or if the source config already names it."""
    ref, read = adapter.base, hints.config.get("base_model_name_or_path")
    if ref is None or ref.id in (None, read):
        return {}
    return {"base_model_name_or_path": ref.id, "revision": ref.revision}


def _formula_fields(updates: Updates, peft_type: str, before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    if peft_type != "LORA":
        return {"fan_in_fan_out": _stored_in_out(updates)} if peft_type == "IA3" else {}
    pairs = {t.path: update for t, group in updates.items() for update in group if isinstance(update, PAIRS)}
    return {**formula_fields(pairs, before), "fan_in_fan_out": _stored_in_out(updates)}


def _stored_in_out(updates: Updates) -> bool:
    """Whether at least one linear layer among the targets is stored as [in, out]."""
    paths = lora_paths(updates)
    return any(
        target.layout == "in out *k"
        and (target.path in paths or any(isinstance(u, IA3) for u in group))
        and not is_embedding(target)
        for target, group in updates.items()
    )


# Create a config's lists of names, so that PEFT selects exactly the modules that have tensors in the file.


NO_MODULE = "dummy-target-modules"
"""The value of `target_modules` with which PEFT allows a LoRA config to select no module."""


def lora_fields(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields of a LORA config that select modules, parameters, biases and tokens."""
    paths = lora_paths(updates)
    targets = [target for target in updates if target.path in paths]
    parameters = [t.path for t in targets if is_parameter(t, paths, base)]
    modules = sorted({config_name(t, paths) for t in targets if t.path not in parameters})
    tokens = {target.path: token_numbers(target, updates) for target in updates if _has(updates[target], Rows)}
    biases = [target for target, group in updates.items() if _only_bias(group)]
    return {
        "target_modules": endings(modules, base) if modules or parameters else NO_MODULE,
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": saved_modules(updates, modules, base),
        "trainable_token_indices": tokens or None,
        "bias": "none" if not biases else "lora_only" if all(t.path in paths for t in biases) else "all",
        **_ANYWHERE,
    }


def ia3_fields(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields of an IA3 config that select modules.

    `target_modules` selects all modules with IA3; `feedforward_modules` selects those whose inputs are scaled.
    """
    members = {target.path: update for target, us in updates.items() for update in us if isinstance(update, IA3)}
    inputs = sorted(path for path, update in members.items() if update.l_in is not None)
    loose = any(path.endswith(tuple(inputs)) for path in members if path not in inputs)
    return {
        "target_modules": _pattern(sorted(members)) if loose else endings(sorted(members), base),
        "feedforward_modules": _pattern(inputs) if loose else inputs,
        "modules_to_save": saved_modules(updates, sorted(members), base),
        "exclude_modules": None,
    }


def family_fields(updates: Updates, family: type[Family], base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields of a family's config that select modules.

    Configs for prompts and X-LoRA do not list adapted modules. Such a config gets `modules_to_save` only if the updates
    replace whole modules, and `task_type` only if the base is an encoder-decoder. It gets no other fields here.
    """
    paths = sorted(target.path for target, group in updates.items() if _has(group, family.methods()))
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
    """Return the fields of an LN_TUNING config that select the modules whose parameters are replaced."""
    config = {
        f"{target.path}." if base is None or f"{target.path}.weight" in base.tensors else target.path
        for target in updates
    }
    return {
        "target_modules": endings(sorted({name.rpartition(".")[0] for name in config}), base),
        "exclude_modules": None,
    }


def token_fields(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the fields of a TRAINABLE_TOKENS config that select modules and tokens."""
    paths = {target.path: token_numbers(target, updates) for target in updates if _has(updates[target], Rows)}
    return {"target_modules": endings(sorted(paths), base), "token_indices": next(iter(paths.values()))}


def token_numbers(target: Target, updates: Updates) -> list[int]:
    """Return the ids of the tokens whose rows an update of the target changes."""
    rows = next(update for update in updates[target] if isinstance(update, Rows))
    return [int(number) for number in as_lazy(rows.index).numpy()]


def endings(modules: Collection[str], base: Checkpoint | None) -> list[str] | str:
    """Return a value for `target_modules` that selects exactly these modules.

    The value is the list of their paths. If a path is also the end of another module's path, the value is a regular
    expression.
    """
    return _pattern(modules) if _also_end_so(modules, base) else sorted(modules)


def saved_modules(updates: Updates, adapted: Iterable[str], base: Checkpoint | None) -> list[str] | None:
    """Return `modules_to_save`, the list of modules whose tensors are all replaced; None if there are no such modules.

    Other replaced parameters need no entry, because PEFT loads them by name.
    """
    whole = [
        target.path
        for target, group in updates.items()
        if all(isinstance(update, Replacement) for update in group) and not _only_bias(group)
        and _is_whole(target.path, group, base)
    ]  # fmt: skip
    hidden = [path for path in whole if any(matches(rf"(^|.*\.){path}($|\..*)", other) for other in adapted)]
    return sorted(set(whole) - set(hidden)) or None


def _is_whole(path: str, group: Sequence[Update], base: Checkpoint | None) -> bool:
    """Whether the updates replace all tensors of the module `path`, and no other module's path ends with `path`.

    If no base is given, this returns True without a check.
    """
    if base is None:
        return True
    tensor_names = {name for name in base.tensors if name.startswith(f"{path}.")}
    ends_so = any(name.rpartition(".")[0].endswith(path) for name in base.tensors if name not in tensor_names)
    return not ends_so and tensor_names == {f"{path}.{field}" for update in group for field in update.tensors}


def _also_end_so(modules: Collection[str], base: Checkpoint | None) -> bool:
    named = set(modules)
    last = {name.rpartition(".")[2] for name in named}
    suffixes: set[str] = set()
    for name in () if base is None else base.tensors:
        # Visit each parent only once: many tensors have the same parents.
        while (name := name.rpartition(".")[0]) and name not in suffixes:
            suffixes.add(name)
            if name.rpartition(".")[2] in last and name not in named and any(end in named for end in _ends(name)):
                return True
    return False


def _ends(name: str) -> Iterator[str]:
    """Yield the rest of a name after each of its dots: `b.c` and `c` for `a.b.c`."""
    while rest := name.partition(".")[2]:
        yield (name := rest)


def _pattern(modules: Iterable[str]) -> str:
    return "|".join(re.escape(module) for module in modules)


def _has(group: tuple[object, ...], method: type | tuple[type, ...]) -> bool:
    return any(isinstance(update, method) for update in group)


def _only_bias(group: tuple[object, ...]) -> bool:
    return any(isinstance(update, Replacement) and update.weight is None for update in group)


_ANYWHERE = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
