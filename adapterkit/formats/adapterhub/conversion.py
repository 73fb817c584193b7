"""Decode a config and tensors into an `Adapter`, and encode an `Adapter` as the contents of a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from ...core.adapter import Adapter, BaseRef, Foreign, Step, Target, Updates
from ...errors import USE_ITS_CONFIG, WRITE_ADAPTERKIT, AdapterkitError, Malformed, Unrepresentable, Unsupported
from ...io.lazy import as_lazy
from .._kit import Loss, all_expressible, leftovers
from . import SAFETENSORS, Content
from .families import FAMILIES, AdapterHubFamily, family_of, family_of_architecture
from .file import (
    AGAIN,
    AdapterHubKey,
    AdapterHubNaming,
    AdapterHubPart,
    AdapterHubUpdate,
    KeptKey,
    family_of_base,
    model_type_of,
    on_outputs,
    parse_keys,
    root_of,
)

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from ...io.strict_json import JsonValue

from .file import RELEASE, AdapterHubSettings

# Decode a config and tensors into an `Adapter`.
#
# Refuse tensors that belong to no update, unless they are known to have no effect.


FORMAT = "adapterhub"
HEAD = "head/"
"""In `Adapter.foreign`, the names of a prediction head's tensors start with this prefix. Other names do not."""


class AdapterHubHints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Details of the source folder. They are stored in the adapter, so that the writer can write the same folder again.

    Attributes:
        config: the contents of the source config.
        file: the name of the tensor file.
        root: the path of the base inside the saved model, as written in the keys; empty if unknown.
        keys: a map from the writer's default key to the file's key, for keys where the two differ.
        compat: the `compat` with which the folder was read.
        interface: the contents of `adapter_interface.json`, or None.
        head: the config of the prediction head, or None.
        head_file: the name of the head's tensor file, or None.
    """

    config: dict[str, Any] = {}
    file: str = ""
    root: str = ""
    keys: dict[str, str] = {}
    compat: str | None = None
    interface: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    head_file: str | None = None


def hints_of(adapter: Adapter) -> AdapterHubHints:
    """Return the stored details of the source folder; default values if the adapter stores no AdapterHub details.

    Raises:
        Malformed: the details are damaged.
    """
    return leftovers(adapter, FORMAT, AdapterHubHints)


# Every tensor must belong to an update, or its key must be in a `KeptKey`. Tensors with a `KeptKey` have no effect; the
# adapter stores them only so that the writer can write them again.


def decode(content: Content, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
    """Convert a folder's contents to an `Adapter`.

    Raises:
        Malformed: a tensor belongs to no update, or the config does not fit the tensor file.
        Unsupported: the config needs a feature that this version does not have.
        ShapeMismatch: the tensors' shapes contradict each other or the config.
    """
    updates, kept, settings = assemble(content, compat=compat, base=base)
    root = _root(parse_keys(content.tensors, settings.name))
    hints = AdapterHubHints(
        config=dict(content.config),
        file=content.file,
        root=root,
        keys=_departures(updates, content, AdapterHubNaming(settings.name, settings.model_type, root)),
        compat=compat,
        interface=None if content.interface is None else dict(content.interface),
        head=None if content.head is None else dict(content.head),
        head_file=content.head_file,
    )
    tensors = {key.text: content.tensors[key.text] for key in kept}
    tensors |= {HEAD + name: tensor for name, tensor in content.head_tensors.items()}
    base_ref = BaseRef(settings.model_name) if settings.model_name else None
    foreign = Foreign(FORMAT, msgspec.to_builtins(hints), tensors)
    return Adapter(updates, base_ref, (Step("read", {"format": FORMAT}),), foreign)


def assemble(
    content: Content, *, compat: str | None = None, base: Checkpoint | None = None, heads: int | None = None
) -> tuple[Updates, list[AdapterHubKey], AdapterHubSettings]:
    """Return (updates by target, keys of tensors that have no effect, settings).

    `heads` is the number of attention heads in the keys and values of prefix tuning. If `heads` is None, the number is
    read from the base.
    """
    settings = parse(content.config, content.interface)
    tensors = parse_keys(content.tensors, settings.name)
    results: list[AdapterHubUpdate] = []
    kept: list[AdapterHubKey] = []
    for at, family, fields in parts(content.config, settings):
        for finding in family.decode(AdapterHubPart(settings, fields, tensors, base, compat, at, heads)):
            if isinstance(finding, KeptKey):
                kept.append(finding.key)
            else:
                results.append(finding)
    _check_all_used(tensors, {*kept, *(key for each in results for key in each.keys)})
    order = {key: position for position, key in enumerate(tensors)}
    updates: dict[Target, tuple[Update, ...]] = {}
    for each in sorted(results, key=lambda each: min(order[key] for key in each.keys)):
        updates[each.target] = (*updates.get(each.target, ()), each.update)
    return updates, kept, settings


def spell(updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
    """Yield (key, tensor) for all tensors of the updates."""
    for family, group in by_family(updates).items():
        yield from family.spell(group, naming)


def by_family(updates: Updates) -> dict[type[AdapterHubFamily], Updates]:
    """Group the updates by family. Omit updates that no family can write."""
    by_family_: dict[type[AdapterHubFamily], dict[Target, tuple[Update, ...]]] = {}
    for target, each in updates.items():
        for update in each:
            if family := family_of(update):
                group = by_family_.setdefault(family, {})
                group[target] = (*group.get(target, ()), update)
    return dict(by_family_)


def _check_all_used(tensors: Mapping[AdapterHubKey, Lazy], used: set[AdapterHubKey]) -> None:
    left = next((key for key in tensors if key not in used), None)
    if left is not None:
        why = "this tensor does not belong to any update that the config describes"
        raise Malformed(why, where=left.text, cure=f"{USE_ITS_CONFIG}, or {AGAIN[0].lower()}{AGAIN[1:]}")


def _departures(updates: Updates, content: Content, naming: AdapterHubNaming) -> dict[str, str]:
    """Return a map from the writer's default key to the file's key, for keys where the two differ."""
    parsed = parse_keys(content.tensors, naming.name)
    had = {naming.key(key.path, key.kind, key.slot): key.text for key in parsed}
    return {key: had[key] for key, _ in spell(updates, naming) if had.get(key, key) != key}


def _root(keys: Iterable[AdapterHubKey]) -> str:
    """Return the path of the base inside the saved model; empty if no key shows it.

    Only keys of tensors that the whole model shares, such as those of prompt tuning, show this path.
    """
    shared = (key.path for key in keys if key.kind in ROOTED and not key.path.endswith(".pool"))
    return next((re.sub(r"(^|\.)(prefix|prompt)_tuning$", "", path) for path in shared), "")


ROOTED = ("invertible_adapters", "prefix_tunings", "prompt_tunings", "shared_parameters")


# Parse the config, and check its fields. A family's `settle` replaces names that old releases used.


def parse(config: Mapping[str, JsonValue], interface: Mapping[str, object] | None = None) -> AdapterHubSettings:
    """Parse the fields of the config outside its sub-dict `config`.

    Raises:
        Malformed: a field is missing or has the wrong type, or the adapter's name is invalid.
    """
    known = {name: config[name] for name in AdapterHubSettings.__struct_fields__ if name in config}
    try:
        settings = msgspec.convert(known | {"interface": interface and dict(interface)}, AdapterHubSettings)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        raise Malformed(why, where=place.strip("`").removeprefix("$.") or "name", cure=_REWRITE) from None
    if not settings.name or re.search(r"[./\\\0]", settings.name):
        why = f"{settings.name[:60]!r} is not a valid adapter name: it is empty, or has a dot or a slash"
        raise Malformed(why, where="name", cure="Save the adapter under another name with the adapters library")
    return settings


def parts(
    config: Mapping[str, object], settings: AdapterHubSettings
) -> Iterator[tuple[str, type[AdapterHubFamily], Any]]:
    """Yield (location in the config, family, typed fields) for the config, or for each member of a union.

    Raises:
        Malformed: a field has the wrong type.
        Unsupported: the architecture is unknown, or an unknown field has a value other than false, null, 0 or empty.
    """
    fields = config.get("config")
    if not isinstance(fields, dict):
        why = f"`config` is {str(fields)[:60]!r}, but must be a dict with the fields of the method"
        raise Malformed(why, where="config", cure="Load and save the adapter with adapters 0.1 or newer")
    if fields.get("architecture") != "union":
        yield _part(fields, "config", settings)
        return
    members = fields.get("configs")
    if not isinstance(members, list) or not members or not all(isinstance(member, dict) for member in members):
        raise Malformed("the union has no list of configs", where="config.configs", cure=_REWRITE)
    for position, member in enumerate(members):
        yield _part(member, f"config.configs[{position}]", settings)


def _part(
    part_fields: Mapping[str, object], at: str, settings: AdapterHubSettings
) -> tuple[str, type[AdapterHubFamily], Any]:
    architecture = part_fields.get("architecture")
    family = family_of_architecture(architecture)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        why = f"this version does not know the architecture {str(architecture)[:60]!r}"
        raise Unsupported(why, where=f"{at}.architecture", cure=f"Known architectures: {known}, union")
    for name, value in part_fields.items():
        if value and name not in {**family.read, **family.harmless, "architecture": ""}:
            why = f"this version does not know this field, and its value {str(value)[:60]} may change the maths"
            raise Unsupported(why, where=f"{at}.{name}", cure=_UPGRADE)
    try:
        fields = msgspec.convert(dict(part_fields), family.fields)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        raise Malformed(why, where=at + place.strip("`").removeprefix("$"), cure=_REWRITE) from None
    return at, family, family.settle(fields, settings)


_REWRITE = "Save the adapter again with the adapters library"
_UPGRADE = "Upgrade adapterkit, or remove the field if it is known to be harmless"

# Encode an `Adapter` as the contents of a folder, and check that these contents read back as the same adapter.
#
# If the source folder's config still describes the adapter, the writer copies this config. Otherwise, the writer
# makes a new config with the fields that release 1.3 of the adapters library writes.


NAME = "adapter"
"""The adapter name that the writer stores if the adapter was read from another format."""


def encode(adapter: Adapter, *, on_loss: str, base: Checkpoint | None) -> tuple[Content, list[str]]:
    """Return the contents of the folder, and one line for each omitted update.

    Raises:
        Unrepresentable: AdapterHub's format cannot express an update, and `on_loss` does not allow omitting the update.
            Or the format cannot express any of the updates, or their combination.
    """
    hints = hints_of(adapter)
    if hints.config and all(family_of(update) for _, update in adapter):
        content = _content(adapter, adapter.updates, hints, hints.config)
        if says(content, adapter.updates, compat=hints.compat, base=base):
            return content, []
    updates, lines = all_expressible(
        on_outputs(adapter.updates, base), lambda updates: _losses(updates, base),
        format_name="AdapterHub", place="an AdapterHub folder", on_loss=on_loss,
    )  # fmt: skip
    content = _content(adapter, updates, hints, _config(adapter, updates, hints, base))
    if not says(content, updates, compat=None, base=base):
        cure = WRITE_ADAPTERKIT
        raise Unrepresentable("AdapterHub's config cannot express this combination of updates", items=lines, cure=cure)
    return content, lines


def _content(adapter: Adapter, updates: Updates, hints: AdapterHubHints, config: Mapping[str, JsonValue]) -> Content:
    root = hints.root or root_of(target.path for target in updates)
    model_type = config.get("model_type")
    naming = AdapterHubNaming(str(config.get("name", NAME)), model_type if isinstance(model_type, str) else None, root)
    spelled = {hints.keys.get(key, key): leaf for key, leaf in spell(updates, naming)}
    kept, head = _kept(adapter)
    stale = {key for family, group in by_family(updates).items() for key in family.stale(group, naming, kept)}
    kept = {key: leaf for key, leaf in kept.items() if key not in stale}
    return Content(
        config=config,
        tensors=spelled | kept,
        file=hints.file or SAFETENSORS,
        interface=hints.interface,
        head=hints.head,
        head_tensors=head,
        head_file=hints.head_file,
    )


def _kept(adapter: Adapter) -> tuple[dict[str, Lazy], dict[str, Lazy]]:
    """Return the tensors in `adapter.foreign`: (tensors from the tensor file, tensors of the prediction head)."""
    foreign = adapter.foreign
    tensors = {} if foreign is None or foreign.format != FORMAT else foreign.tensors
    weights = {key: as_lazy(leaf) for key, leaf in tensors.items() if not key.startswith(HEAD)}
    return weights, {key.removeprefix(HEAD): as_lazy(leaf) for key, leaf in tensors.items() if key.startswith(HEAD)}


def _config(
    adapter: Adapter, updates: Updates, hints: AdapterHubHints, base: Checkpoint | None
) -> dict[str, JsonValue]:
    configs = [{**family.fresh, **family.compose(each, base)} for family, each in by_family(updates).items()]
    known = {} if base is None else base.config or {}
    ref = adapter.base.id if adapter.base else None
    model_type = family_of_base((target.path for target in updates), model_type_of(base))
    return {
        "hidden_size": known.get("hidden_size"),
        "model_class": None,
        "model_type": model_type,
        "name": NAME,
        **hints.config,
        "config": configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs},
        "model_name": ref or hints.config.get("model_name"),
        "version": RELEASE,
    }


def _losses(updates: Updates, base: Checkpoint | None) -> dict[Loss, None]:
    problems: dict[tuple[Target, int], str] = {}
    for target, each in updates.items():
        for position, update in enumerate(each):
            if family_of(update) is None:
                problems[target, position] = f"the adapters library does not have the method {update.method}"
    for family, group in by_family(updates).items():
        for target, position, why in family.losses(group, base):
            # `position` counts only the updates of this family. The losses need the position among all updates.
            index = next(i for i, update in enumerate(updates[target]) if update is group[target][position])
            problems.setdefault((target, index), why)
    return dict.fromkeys((target, position, why) for (target, position), why in problems.items())


# Check that reading the folder's contents would give the same updates. Compare the updates' methods and attributes, and
# the shapes and dtypes of their tensors, but not the tensors' values.


def says(content: Content, updates: Updates, *, compat: str | None, base: Checkpoint | None) -> bool:
    """Whether reading `content` would give `updates`. Values of tensors are not compared."""
    written = json.loads(json.dumps(dict(content.config), sort_keys=True))
    prefixes = FAMILIES["prefix_tuning"].methods
    matrices = [u.tensors.get("P", u.tensors.get("b2")) for us in updates.values() for u in us if u.method in prefixes]
    heads = next((int(leaf.shape[2]) for leaf in matrices if leaf is not None), None)
    try:
        read, _, _ = assemble(replace(content, config=written), compat=compat, base=base, heads=heads)
    except AdapterkitError:
        return False
    return _outlines(read) == _outlines(updates)


def _outlines(updates: Updates) -> dict[tuple[str, tuple[int, int] | None], object]:
    return {(target.path, target.rows): [_outline(update) for update in group] for target, group in updates.items()}


def _outline(update: Update) -> tuple[object, ...]:
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    return update.method, update.attributes, {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves.items()}
