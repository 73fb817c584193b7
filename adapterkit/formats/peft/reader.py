"""A config and tensors in, an `Adapter` out; every tensor is accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...adapter import Adapter, BaseRef, Foreign, Step, Target
from ...errors import Malformed
from ...methods.replacement import Replacement
from ...tensors.lazy import as_lazy
from . import config as fields
from . import ia3, lora, replacement, rows
from .file import File, Found, Kept
from .keys import PREFIX, parse_keys
from .spelling import spell, stored

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint
    from ...tensors.lazy import Lazy
    from ...updates import Update

FAMILIES = {
    "IA3": (replacement.decode, ia3.decode),
    "LORA": (replacement.decode, lora.decode, rows.decode),
    "TRAINABLE_TOKENS": (replacement.decode, rows.decode),
}
"""peft_type -> what its files hold, in the order in which it acts on a module."""

Updates = dict[Target, tuple["Update", ...]]
Places = dict[tuple[Target, int, str], str]
"""(target, position among its updates, field) -> key."""


def decode(
    config: Mapping[str, Any], tensors: Mapping[str, Lazy], *, compat: str | None = None, base: Checkpoint | None = None
) -> Adapter:
    """The adapter that a config and tensors make up.

    Raises:
        Malformed: a tensor is not accounted for, or the config is not of this file.
        Unsupported: the config asks for what this version does not know.
        ShapeMismatch: shapes disagree with each other or with the config.
        UsageError: the file does not tell which parameters it adapts, and there is no base to tell.
    """
    settings = fields.parse(config)
    prefix, keys = parse_keys(tensors)
    file = File(settings, keys, base, compat)
    updates, places, kept = assemble(file)
    data: dict[str, Any] = {"config": dict(config), "targets": fingerprint(updates)}
    if prefix != PREFIX:
        data["prefix"] = prefix
    data |= _departures(updates, places, tensors, prefix, settings.peft_type)
    ref = BaseRef(settings.base_model_name_or_path, settings.revision) if settings.base_model_name_or_path else None
    foreign = Foreign("peft", data, {key: tensors[key] for key in kept})
    return Adapter(updates, ref, (Step("read", {"format": "peft"}),), foreign)


def assemble(file: File) -> tuple[Updates, Places, list[str]]:
    """The updates by target, the keys that their tensors came from, and the keys that are only kept."""
    found: dict[tuple[str, tuple[int, int] | None], list[Found]] = {}
    kept: list[str] = []
    used: set[str] = set()
    for family in FAMILIES[file.settings.peft_type]:
        for finding in family(file):
            if isinstance(finding, Kept):
                kept.append(finding.key.text)
            else:
                found.setdefault((finding.path, finding.rows), []).append(finding)
                used.update(key.text for key in finding.keys.values())
    _check_all_used(file, used.union(kept))
    updates: Updates = {}
    places: Places = {}
    for (path, span), findings in _in_file_order(file, found).items():
        target = Target(path, _layout(findings), span)
        updates[target] = tuple(_in_layout(finding, target) for finding in findings)
        places |= {(target, i, name): key.text for i, f in enumerate(findings) for name, key in f.keys.items()}
    return updates, places, kept


def fingerprint(updates: Iterable[Target] | Updates) -> str:
    """sha256 over the paths of an adapter: whether the lists of modules in a config are still right."""
    return hashlib.sha256("\n".join(sorted(str(target) for target in updates)).encode()).hexdigest()


def _check_all_used(file: File, used: set[str]) -> None:
    left = next((key for key in file.tensors if key.text not in used), None)
    if left is not None:
        why = f"a tensor that {file.settings.peft_type} has no place for"
        raise Malformed(why, where=left.text, cure="Save the adapter again, or take the tensor out")


def _in_file_order(file: File, found: Mapping[Any, list[Found]]) -> dict[Any, list[Found]]:
    order = {key.text: position for position, key in enumerate(file.tensors)}

    def position(item: tuple[Any, list[Found]]) -> tuple[int, tuple[int, int]]:
        return min(order[key.text] for finding in item[1] for key in finding.keys.values()), item[0][1] or (0, 0)

    return dict(sorted(found.items(), key=position))


def _layout(findings: Iterable[Found]) -> str:
    """The layout that the acting update declares, corrected by a whole weight beside it where that proves it wrong."""
    acting = [finding for finding in findings if not isinstance(finding.update, Replacement)]
    if not acting:
        return "out *in"
    layout, dims = acting[0].layout, acting[0].update.dims(acting[0].layout.startswith("e "))
    sizes = dims.get("out"), dims.get("in")
    for finding in findings:
        weight = getattr(finding.update, "weight", None)
        if weight is not None and layout in ("out *in", "in out *k") and sizes[0] != sizes[1]:
            shown = tuple(weight.shape[:2])
            layout = "out *in" if shown == sizes else "in out *k" if shown == sizes[::-1] else layout
    return layout


def _in_layout(finding: Found, target: Target) -> Update:
    update = finding.update
    if isinstance(update, Replacement) and update.weight is not None:
        return update.replace(weight=stored(as_lazy(update.weight), target.layout))
    return update


def _departures(
    updates: Updates, places: Places, tensors: Mapping[str, Lazy], prefix: str, peft_type: str
) -> dict[str, Any]:
    """Where the file's keys and shapes are not those that the writer would have chosen."""
    keys, shapes = {}, {}
    for spelled in spell(updates, peft_type, prefix):
        text = places.get(spelled.place)
        if text is None:
            continue
        if text != spelled.key or spelled.guessed:
            keys[spelled.key] = text
        if tensors[text].shape != spelled.leaf.shape:
            shapes[text] = list(tensors[text].shape)
    return {name: value for name, value in (("keys", keys), ("shapes", shapes)) if value}
