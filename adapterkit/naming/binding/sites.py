"""Map an adapter's targets to a base's tensors, and check that the base is of the family that the adapter records."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import msgspec

from ...core.adapter import LAYOUTS, Adapter, Target
from ...core.metadata import model_class_of, model_types_of
from ...core.updates import Update
from ...errors import USE_ITS_BASE, AdapterkitError, TargetNotFound, UsageError, nearest
from ..architectures import (
    Architecture,
    architecture_of,
    decoded,
    expert_count,
    folder,
    is_family,
    of_gguf,
    shape_of,
    with_names,
)
from ..gguf import ARCHITECTURE
from ..moves import Move, MoveRule, Names, Resolution, exchangeable, stored_in_out
from ..renames import Rename, family_of, parse_renames, renamed_by
from ..resolver import Fits, resolve
from .fitting import Shapes, fits, names_family, paths_of
from .moving import moved

# Find the stored tensors of an adapter's targets.


def check_family(adapter: Adapter, config: Mapping[str, object] | None) -> None:
    """Refuse a base whose family differs from the family that the adapter records.

    A base that contains a model of the recorded family also passes: an adapter for a Llama fits a LLaVA whose language
    model is a Llama. The check is skipped for models that neither transformers nor a family's file lists.

    The check is also skipped if the adapter's lineage has a `rename` step, because the user's rules take precedence.

    Args:
        adapter: the adapter. Its lineage or its config may record a family.
        config: the base's config; None skips the check.

    Raises:
        TargetNotFound: the base does not contain a model of the family that the adapter records.
    """
    if any(step.op == "rename" for step in adapter.recipe):
        return
    trained = {name: module for name in model_types_of(adapter) if (module := module_of(name)) is not None}
    given, kind = models_of(config or {}), model_class_of(adapter)[0] or None
    if not any(module_of(name) for name in given):
        return
    other = next((name for name, module in trained.items() if not has_model(given, module, kind)), None)
    # Two models can have the same class but different model_types: in transformers 5, EXAONE models have their own
    # model_type, but their class is the class of Llama models. So also accept a base whose config lists the class that
    # the adapter records.
    listed = (config or {}).get("architectures")
    same = isinstance(listed, list) and kind in listed
    if other is not None and not same:
        cure = (
            f"Pass a base of the family {other}; to use this base anyway, pass a rule for names, such as "
            "--rename 'model=model' (rename=['model=model'])"
        )
        why = f"the adapter was trained on a model of the family {other}, but the base is {' with '.join(given)}"
        raise TargetNotFound(why, where=next((target.path for target in adapter.updates), None), cure=cure)


Prefix = tuple[str, str]
"""(prefix to remove from each path, prefix to add)."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """The stored tensors of one target: the names of its weight and bias, each None if the base has no such tensor."""

    target: Target
    updates: tuple[Update, ...]
    weight: str | None
    bias: str | None

    def form(self, shapes: Shapes) -> Hashable:
        """Return a key for caching shape checks. A check has the same result for all sites with equal keys.

        The key consists of the layout, the rows, the shapes of the stored tensors, and `Update.form` of each update. It
        does not depend on the values of tensors.
        """
        weight = None if self.weight is None else shapes[self.weight]
        bias = None if self.bias is None else shapes[self.bias]
        return self.target.layout, self.target.rows, weight, bias, tuple([update.form for update in self.updates])


def apart(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """Split an adapter in two: the first has the updates of weights and outputs, the second has the context updates."""
    context = {t: us for t, us in adapter.updates.items() if any(u.kind == "context" for u in us)}
    others = {t: us for t, us in adapter.updates.items() if t not in context}
    return adapter.replace(updates=others), adapter.replace(updates=context)


def find_parts(
    adapter: Adapter, shapes: Shapes, renamed: Prefix | None, rules: Sequence[Rename] = ()
) -> dict[Target, tuple[Update, ...]]:
    """Find the module of the base to which each context update belongs.

    Return the context updates by target. The path of each target in the result is the path of its module in the base.
    The path is empty if the module is the whole model.

    Args:
        adapter: an adapter that contains only context updates, see `apart`.
        shapes: the shapes of the base's stored tensors, by name.
        renamed: the change of prefix that mapped the adapter's other updates; None if there was none.
        rules: the user's rules for names.

    Raises:
        TargetNotFound: the base does not have one of the modules.
    """
    parts: dict[Target, tuple[Update, ...]] = {}
    if not adapter.updates:
        return parts
    modules = {name[:stop] for name in shapes for stop in range(len(name)) if name[stop] == "."}
    for target, updates in adapter.updates.items():
        path = renamed_by(target.path, rules)[0] if target.path else ""
        if path and path not in modules:
            off, on = renamed or _part_change(path, modules)
            path = on + path.removeprefix(off)
        if path and path not in modules:
            cure = nearest(target.path, modules) or USE_ITS_BASE
            raise TargetNotFound("the base does not have this module", where=str(target), cure=cure)
        parts[replace(target, path=path)] = updates
    return parts


def _part_change(path: str, modules: set[str]) -> Prefix:
    """Return the change of prefix that maps `path` to a module of the base, if exactly one change does so.

    Otherwise, return `("", "")`.
    """
    parts = path.split(".")
    off = [".".join(parts[:cut]) + "." for cut in range(1, len(parts)) if ".".join(parts[cut:]) in modules]
    on = [module.removesuffix(path) for module in modules if module.endswith(f".{path}")]
    changes = [(prefix, "") for prefix in off] + [("", prefix) for prefix in on]
    return changes[0] if len(changes) == 1 else ("", "")


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """The result of `find_sites`.

    Attributes:
        sites: the stored tensors of the targets, in the adapter's order. A target that the base stores in several
            tensors has several sites.
        origins: for each site, the target in the adapter. If single experts were joined into a stack, the origin is the
            target of the first expert.
        missing: the targets that the base does not have.
        rules: the rules that mapped names.
        renamed: the first change of prefix that was used, as (removed, added); None if no prefix changed.
        config: the base's config. If the base's config names no family, `find_sites` adds the `model_type` of the
            family that a user's rule names, or of the family that it deduces from names and shapes.
    """

    sites: list[Site]
    origins: list[Target]
    missing: list[Target]
    rules: tuple[MoveRule, ...] = ()
    renamed: Prefix | None = None
    config: Mapping[str, Any] | None = None


def find_sites(
    adapter: Adapter,
    shapes: Shapes,
    *,
    partial: bool,
    modules: Iterable[str] = (),
    config: Mapping[str, object] | None = None,
    rename: str | Sequence[str | Rename] = (),
) -> Bound:
    """Find the stored tensors of every target; see `naming.resolver` for the order in which rules are tried.

    If all updates of a target change the output of its module, the target needs no weight. Such a
    target may be any module that contains stored tensors or is listed in `modules`.

    Args:
        adapter: the adapter.
        shapes: the shapes of the base's stored tensors, by name.
        partial: whether to omit targets that the base does not have.
        modules: the paths of further modules of the base, which may have no stored tensors.
        config: the base's config. Its `model_type` selects the family's file.
        rename: the user's rules, each `FROM=TO`, `@FILE` or `family:NAME`.

    Raises:
        TargetNotFound: the base has none of the targets; `partial` is false, and the base lacks some of the targets; a
            name can mean two different modules; or `rename` is empty, and the adapter records a family that differs
            from the base's family.
        ShapeMismatch, NotMergeable, Unsupported: the base splits, fuses or stacks the weight of a target, and the
            target's update cannot be split, fused or stacked in the same way.
    """
    if not adapter.updates:
        return Bound([], [], [])
    if not rename:
        check_family(adapter, config)
    outer = {target.path for target, updates in adapter.updates.items() if all(u.kind == "output" for u in updates)}
    below = {name[:at] for name in shapes for at, letter in enumerate(name) if letter == "."} if outer else set()
    names = Names(paths_of(shapes), frozenset({*below, *modules}), frozenset(outer), experts=expert_count(config))
    by_path: dict[str, Target] = {}
    for target in adapter.updates:
        by_path.setdefault(target.path, target)

    def fitting(path: str, place: str) -> bool:
        target = by_path[path]
        name = f"{place}.weight" if f"{place}.weight" in shapes else place
        return name not in shapes or any(
            fits(replace(target, layout=layout), adapter.updates[target], shapes[name])
            for layout in LAYOUTS
            if layout.startswith("e ") == target.stacked
        )

    rules = parse_renames(rename)
    architecture = family_of(rules) or architecture_of(config)
    resolution = resolve(
        list(by_path), names, architecture=architecture, renames=rules, partial=partial, fits=fitting
    )  # fmt: skip
    if resolution.missing and architecture is None and config is not None:
        _place_in_parts(resolution, names, config, fitting)
    if resolution.missing and architecture is None and not names_family(config):
        lost = set(resolution.missing)
        placeless = {target: updates for target, updates in adapter.updates.items() if target.path in lost}
        trained = [name for name in model_types_of(adapter) if architecture_of({"model_type": name}) is not None]
        architecture = deduced(placeless, names, shapes, trained)
        if architecture is not None:
            resolution = resolve(
                list(by_path), names, architecture=architecture, renames=rules, partial=partial, fits=fitting
            )  # fmt: skip
    if architecture is not None and not names_family(config):
        config = {**(config or {}), "model_type": architecture.record.model_types[0]}
    lost = set(resolution.missing)
    missing = [target for target in adapter.updates if target.path in lost]
    if missing and (not partial or len(missing) == len(adapter.updates)):
        raise _not_found(missing, adapter, names)
    sites, origins = [], []
    for origin, target, updates in moved(adapter.updates, resolution.moves, shapes, config):
        keys = _keys(target.path, shapes) if target.path in names.paths else (None, None)
        if origin.path in outer:
            weight, bias = f"{target.path}.weight", f"{target.path}.bias"
            keys = weight if weight in shapes else None, bias if bias in shapes else None
        sites.append(Site(target, updates, *(keys or (None, None))))
        origins.append(origin)
    return Bound(
        sites,
        origins,
        missing,
        tuple(resolution.rules),
        resolution.prefixes[0] if resolution.prefixes else None,
        config,
    )


def _place_in_parts(resolution: Resolution, names: Names, config: Mapping[str, object], fits: Fits) -> None:
    """Map the missing targets that belong to a model inside the base. Use the file of that model's family.

    The config of an encoder-decoder can contain a config for the encoder and a config for the decoder. For example, a
    published TrOCR model has the model type `vision-encoder-decoder`, and its encoder can be a ViT. The file of the ViT
    family is needed because transformers 5 renamed the layers of ViT: the file has both the old and the new names.
    """
    for key, part in config.items():
        if not isinstance(part, Mapping) or (architecture := architecture_of(part)) is None:
            continue
        for prefix in (f"{key}.", f"{key.removesuffix('_config')}_model."):
            ours = [path.removeprefix(prefix) for path in resolution.missing if path.startswith(prefix)]
            inside = frozenset(path.removeprefix(prefix) for path in names.paths if path.startswith(prefix))
            if not ours or not inside:
                continue
            placed = resolve(
                ours, Names(inside, experts=expert_count(part)), architecture=architecture,
                fits=lambda path, place, at=prefix: fits(at + path, at + place),  # type: ignore[misc]
            )  # fmt: skip
            for path, moves in placed.moves.items():
                resolution.moves[prefix + path] = tuple(replace(move, path=prefix + move.path) for move in moves)
            resolution.missing = [path for path in resolution.missing if path not in resolution.moves]
            resolution.rules += [replace(rule, text=f"{rule.text} in {prefix}") for rule in placed.rules]


def _keys(path: str, shapes: Shapes) -> tuple[str | None, str | None] | None:
    """Return the stored names of the weight and the bias of `path`, which is a module or a parameter.

    The name of a tensor that the base does not store is None. Return None if the base stores neither tensor.
    """
    weight, bias = f"{path}.weight", f"{path}.bias"
    if weight in shapes or bias in shapes:
        return weight if weight in shapes else None, bias if bias in shapes else None
    if path not in shapes:
        return None
    stem, matched, tail = path.rpartition("weight")
    bias = f"{stem}bias{tail}"
    return path, bias if matched and bias in shapes else None


_FACTOR = re.compile(r"[._](lora_|hada_|lokr_|oft_)")
"""Matches names of adapter tensors. If all modules of a base match, the base is itself an adapter."""


def _not_found(missing: list[Target], adapter: Adapter, names: Names) -> TargetNotFound:
    stored = (name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in names.paths)
    modules = {*stored, *(names.outer if names.anywhere else ())}
    count = f"{len(missing)} of {len(adapter.updates)} targets are" if len(adapter.updates) > 1 else "the target is"
    shown = ", ".join(str(target) for target in missing[:3]) + (", ..." if len(missing) > 3 else "")
    partly = "" if len(missing) == len(adapter.updates) else _PARTLY
    near = nearest(missing[0].path, modules) or "No name in the base is similar: is this the right base?"
    if modules and all(_FACTOR.search(module) for module in modules):
        near = "This base is an adapter itself: instead, give the model that this adapter was trained on"
    return TargetNotFound(f"{count} not in the base: {shown}", where=str(missing[0]), cure=near + partly)


_PARTLY = "; to omit missing targets, allow a partial match: --allow-partial (allow_partial=True)"


# Find the family of a base without a config: try every family's file, and compare names and shapes.
#
# A folder of shards without config.json has no `model_type`. The names in its shards, such as `mlp.experts.0.up_proj`,
# often belong to several families. If all of these families map the adapter's targets to the same weights, any of them
# can be used.


Updates = Mapping[Target, tuple[Update, ...]]
Reading = tuple[tuple[str, tuple[Move, ...]], ...]


def deduced(updates: Updates, names: Names, shapes: Shapes, families: Sequence[str] = ()) -> Architecture | None:
    """Find the family whose file maps the targets to weights of the base.

    The shapes of these weights must fit the targets' updates.

    Args:
        updates: the updates of the targets that have not been found in the base yet, by target.
        names: the base's names.
        shapes: the shapes of the base's tensors, by name.
        families: the model types that the adapter records for its base; if empty, all families are tried.

    Returns:
        the family that maps the most targets; None if no family maps a target. If several families map the same targets
        to the same weights, the result is the first of them.

    Raises:
        TargetNotFound: two families map the targets to different weights, and the shapes fit in both cases.
        UsageError: no family fits, and at least one family could not be tried, because its file splits a fused
            projection by heads, and the numbers of heads are unknown without a config.
    """
    some = _one_of_each_form(updates)
    readings: dict[Reading, list[Architecture]] = {}
    heads: UsageError | None = None
    every = [known for name in families if (known := architecture_of({"model_type": name})) is not None]
    for architecture in every or with_names(target.path for target in some):
        try:
            reading = _reading(some, names, shapes, architecture)
        except UsageError as error:
            heads = heads or error
            continue
        except AdapterkitError:
            continue
        # Names and shapes are not enough: a family's file could map an encoder's layer to a decoder's layer of the same
        # shape. So remove the common ending of the two names, and compare the words that remain.
        if reading and (every or all(_may_be(path, move.path) for path, moves in reading for move in moves)):
            readings.setdefault(reading, []).append(architecture)
    most = max(map(len, readings), default=0)
    best = {reading: known for reading, known in readings.items() if len(reading) == most}
    if len(best) > 1:
        raise _ambiguous(best)
    if not best:
        if heads is not None:
            raise heads
        return None
    (alike,) = best.values()
    return alike[0]


def _one_of_each_form(updates: Updates) -> Updates:
    """Among targets whose names differ only in numbers, keep only the first, because layers and experts are alike."""
    some: dict[str, Target] = {}
    for target in updates:
        some.setdefault(shape_of(target.path), target)
    return {target: updates[target] for target in some.values()}


def _reading(updates: Updates, names: Names, shapes: Shapes, architecture: Architecture) -> Reading:
    """Map the targets with one family's file.

    Return (target's path, moves) pairs, sorted by path; an empty tuple if a shape does not fit.
    """
    paths = [target.path for target in updates]
    moves = resolve(paths, names, architecture=architecture, partial=True).moves
    placed = moved(updates, moves, shapes)
    # Compare shapes in the layout that the family uses: if the family stores [expert, in, out], a base that stores
    # [expert, out, in] is not of this family.
    config = {"model_type": architecture.record.model_types[0]}
    fit = all(_fits(there, given, shapes, bool(stored_in_out(there.path, config))) for _, there, given in placed)
    return tuple(sorted(moves.items())) if fit else ()


def _may_be(name: str, place: str) -> bool:
    """Whether `name` and `place` may be the same module: drop their common ending, and compare the words before it."""
    ours, theirs = name.split("."), place.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return not ours or not theirs or exchangeable(".".join([*ours, ""]), ".".join([*theirs, ""]))


def _fits(target: Target, updates: tuple[Update, ...], shapes: Shapes, in_out: bool) -> bool:
    name = f"{target.path}.weight" if f"{target.path}.weight" in shapes else target.path
    start = ("e in" if in_out else "e ") if target.stacked else ("in", "out")
    layouts = (layout for layout in LAYOUTS if layout.startswith(start))
    return name not in shapes or any(fits(replace(target, layout=layout), updates, shapes[name]) for layout in layouts)


def _ambiguous(readings: Mapping[Reading, list[Architecture]]) -> TargetNotFound:
    """Return an error about the first target that two families map differently; the error names both destinations."""
    (one, first), (other, second), *_ = readings.items()
    target = next((path for path, moves in one if dict(other).get(path) != moves), one[0][0])
    texts = [
        f"{_destinations_text(dict(reading).get(target, ()))} as in {_listed(each.family for each in known)}"
        for reading, known in ((one, first), (other, second))
    ]
    return TargetNotFound(
        f"the base has no config.json that names its family, and two families fit: {' or '.join(texts)}", where=target,
        cure=f"Choose one: --rename family:{first[0].family} or --rename family:{second[0].family} (rename=), or "
        'put a config.json with its "model_type" next to the shards',
    )  # fmt: skip


def _destinations_text(moves: Sequence[Move]) -> str:
    """Return the first two destinations as text for an error message; `nowhere` if there are none."""
    texts = []
    for move in moves[:2]:
        rows: Any = move.take or move.into
        which = (
            "" if rows is None else f", part {rows.number + 1} of {rows.of}{' row by row' if rows.interleaved else ''}"
        )
        texts.append(f"{move.path}{which}")
    return " and ".join(texts) or "nowhere"


def _listed(families: Iterable[str]) -> str:
    every = list(families)
    return ", ".join(every[:3]) + (" and others" if len(every) > 3 else "")


# Compare the model that an adapter records with the models that a base contains.
#
# PEFT records the Python module of transformers that defines the model, such as `gemma3`, and the model's class. A
# base's config has a model type for the whole model and one for each part. `spec/architectures/model_types` maps model
# types to Python modules.


class ModelTypeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of a file in `spec/architectures/model_types`.

    Attributes:
        format: the version of the file's format.
        modules: a map from each model type to the Python module of transformers that defines it.
        parts: for each class that implements only a part of a model, the model types of that part.
        sources: the versions of the tools from which the data comes.
    """

    format: int
    modules: dict[str, str]
    parts: dict[str, list[str]]
    sources: list[str] = []


@cache
def table() -> ModelTypeTable:
    """Load the table of transformers' model types.

    Raises:
        Malformed: the file is damaged.
    """
    return decoded(folder() / "model_types" / "transformers.toml", ModelTypeTable)


def module_of(name: str) -> str | None:
    """Return the Python module of transformers that defines the model type `name`; None if `name` is unknown.

    `name` may also be the name of such a module, or the name of a family that has a file (users can add such files).
    For the name of a module or a family, the result is `name` itself, in lower case and with `_` instead of `-`. If
    `name` is also a model type that transformers knows, the result is the module of this model type.
    """
    word = name.lower().replace("-", "_")
    kind = table().modules.get(name) or _by_word().get(word)
    return kind or (word if word in _modules() or is_family(word) else None)


@cache
def _by_word() -> Mapping[str, str]:
    return {name.lower().replace("-", "_"): module for name, module in table().modules.items()}


@cache
def _modules() -> frozenset[str]:
    return frozenset(table().modules.values())


@cache
def _parts_with() -> frozenset[str]:
    """Return the model types that stand for parts of models, such as `gemma3_text`.

    The result has all types that the table's `parts` lists. If a model type has the name of its Python module, the
    result also has all other types of this module. For example, the module `gemma3` defines the types `gemma3` and
    `gemma3_text`, so `gemma3_text` is in the result.
    """
    modules = table().modules
    whole = {module for name, module in modules.items() if name.replace("-", "_") == module}
    beside = {name for name, module in modules.items() if module in whole and name.replace("-", "_") != module}
    return frozenset(beside.union(*table().parts.values()))


def models_of(config: Mapping[str, object]) -> dict[str, bool]:
    """Return the model types in a base's config, each with True for the whole model or False for a part of it.

    For a GGUF file, the result has all model types for which llama.cpp's converter writes this file's
    `general.architecture`.
    """
    types: dict[str, bool] = {}
    if isinstance(architecture := config.get(ARCHITECTURE), str):
        # One architecture may have several families: DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash are all `deepseek2`.
        types |= {name: True for family in of_gguf(architecture) for name in family.record.model_types}
    if isinstance(model_type := config.get("model_type"), str) and model_type:
        types[model_type] = True
    for part in config.values():
        # Look at all fields: most models store the config of a part in a field such as `text_config`, but
        # encoder-decoders use the fields `encoder` and `decoder`.
        if isinstance(part, Mapping):
            types |= {name: False for name in models_of(part) if name not in types}
    return types


def has_model(given: Mapping[str, bool], module: str, trained_class: str | None) -> bool:
    """Whether a base's model types show that the base contains the model on which an adapter was trained.

    Args:
        given: the result of `models_of` for the base.
        module: the Python module of transformers that defines the model on which the adapter was trained.
        trained_class: the name of this model's class; None if the adapter does not record it.
    """
    types = table().parts.get(trained_class or "")
    there = {name: whole for name, whole in given.items() if module_of(name) == module}
    if trained_class is None:
        return bool(there)
    if types is None:
        # The adapter was trained on a whole model. Refuse a larger base that contains only a part of this model:
        # MusicFlamingo contains AudioFlamingo 3's audio encoder. But accept a base that is such a part itself: an
        # adapter of the whole Gemma 3 may fit Gemma 3's text model.
        return any(whole or name not in _parts_with() for name, whole in there.items())
    # The adapter was trained on a part. Accept the same part, and accept whole models, because they contain all parts
    # that their Python module defines. Parakeet is an exception: one module defines several models with different
    # heads, and none of these models contains another. So the table lists each of them as a part.
    return any(name in types or (whole and name not in _parts_with()) for name, whole in there.items())
