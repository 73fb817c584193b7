"""Decode a config and tensors into an `Adapter`; refuse tensors of unknown meaning, so that no change is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ...core.adapter import Adapter, BaseRef, Foreign, Step, Target
from ...errors import Malformed
from ...io.lazy import as_lazy
from ...methods.replacement import Replacement
from .._format import UNKNOWN
from . import config as fields
from . import decoders
from .factors import ORDERS
from .families import family_of_type
from .file import FORMAT, DecodedUpdate, File, Kept, Key, PeftHints, fingerprint, parse_keys, prefix_of
from .spelling import are_plain, spell_updates, stored

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from ...io.strict_json import JsonValue

BUILT_IN = {
    "IA3": (decoders.decode_replacement, decoders.decode_ia3),
    "LN_TUNING": (decoders.decode_replacement, decoders.decode_ln_tuning),
    "LORA": (decoders.decode_replacement, decoders.decode, decoders.decode_rows),
    "TRAINABLE_TOKENS": (decoders.decode_replacement, decoders.decode_rows),
}
"""For each `peft_type`, the decoders in the order in which PEFT applies the updates.

`families` has the decoders for all other values of `peft_type`.
"""

Updates = dict[Target, tuple["Update", ...]]
Places = dict[Target, list[Mapping[str, Key]]]
"""For each target, a list with one map per update. Each map goes from a field's name to the key of its tensor."""


def decode(
    config: Mapping[str, JsonValue],
    tensors: Mapping[str, Lazy],
    *,
    compat: str | None = None,
    base: Checkpoint | None = None,
    strict: bool = False,
) -> Adapter:
    """Decode a file's config and tensors into an adapter.

    Args:
        config: the config.
        tensors: the tensors by key.
        compat: see `Format.read`.
        base: the base, or None.
        strict: whether to refuse every config field that PEFT does not define, even a harmless one.

    Raises:
        Malformed: a tensor belongs to no update, or the config belongs to another file.
        Unsupported: the config needs a feature that this version of adapterkit does not have.
        ShapeMismatch: the tensors' shapes contradict each other or the config.
        UsageError: the file does not show which parameters it adapts, and no base is given.
    """
    settings = fields.parse(config, strict=strict)
    prefix, parsed = parse_keys(tensors, prefix_of(settings.peft_type))
    file = File(settings, parsed, base, compat)
    updates, places, kept = assemble(file)
    keys, shapes = _departures(updates, places, tensors, prefix, settings.peft_type)
    if compat in ORDERS:
        compat = None  # This `compat` is the order of stacked experts. Do not record it: the writer uses PEFT's order.
    hints = PeftHints(
        config=dict(config), targets=fingerprint(updates), prefix=prefix, keys=keys, shapes=shapes, compat=compat
    )
    foreign = Foreign(FORMAT, msgspec.to_builtins(hints), {key: tensors[key] for key in kept})
    name = settings.base_model_name_or_path
    base_ref = BaseRef(name, settings.revision) if name else None
    unknown = fields.unknown_fields(config)
    step = Step("read", {"format": FORMAT, UNKNOWN: unknown} if unknown else {"format": FORMAT})
    return Adapter(updates, base_ref, (step,), foreign)


def without_config(adapter: Adapter, config: Mapping[str, JsonValue], *, assumed: bool) -> Adapter:
    """Record in the lineage that the adapter was read without a config, and remove the config generated for it.

    PEFT loads only configs that list the modules, and the generated config does not list them. So the writer composes
    a new config, as for an adapter from another format.

    Args:
        adapter: the adapter, which was read with the generated config.
        config: the generated config.
        assumed: whether the file has no alpha, so that the rank of each module was used as its alpha.
    """
    foreign, (step,) = adapter.foreign, adapter.recipe
    compat = None if foreign is None else foreign.data.get("compat")
    assert compat is None or isinstance(compat, str)  # this module wrote it
    origin = {"alpha": "rank" if assumed else config["lora_alpha"], "config": None}
    kept = None if compat is None else Foreign(FORMAT, msgspec.to_builtins(PeftHints(compat=compat)))
    return adapter.replace(recipe=(Step("read", {**step.args, **origin}),), foreign=kept)


def assemble(file: File) -> tuple[Updates, Places, list[str]]:
    """Return the updates by target, the keys of the updates' tensors, and the keys of tensors that have no effect."""
    by_place: dict[Place, list[DecodedUpdate]] = {}
    kept: list[str] = []
    used: set[Key] = set()
    peft_type = file.settings.peft_type
    family = family_of_type(peft_type)
    for decode in BUILT_IN[peft_type] if family is None else (decoders.decode_replacement, family.decode):
        for finding in decode(file):
            if isinstance(finding, Kept):
                kept.append(finding.key.text)
                used.add(finding.key)
            else:
                by_place.setdefault((finding.path, finding.rows), []).append(finding)
                used.update(finding.keys.values())
    _check_all_used(file, used)
    updates: Updates = {}
    places: Places = {}
    for (path, span), findings in _in_file_order(file, by_place):
        target = Target(path, _layout(findings), span)
        updates[target] = tuple([_in_layout(finding, target) for finding in findings])
        places[target] = [finding.keys for finding in findings]
    return updates, places, kept


def _check_all_used(file: File, used: set[Key]) -> None:
    if not used.issuperset(file.tensors):
        left = next(key for key in file.tensors if key not in used)
        why = f"this key is unknown: PEFT stores no such tensor for the peft_type {file.settings.peft_type}"
        raise Malformed(why, where=left.text, cure="Save the adapter again, or remove the tensor")


Place = tuple[str, tuple[int, int] | None]
"""(path of a module, range of its weight's rows); the range is None for all rows."""


def _in_file_order(
    file: File, by_place: Mapping[Place, list[DecodedUpdate]]
) -> list[tuple[Place, list[DecodedUpdate]]]:
    order = {key.text: position for position, key in enumerate(file.tensors)}

    def position(item: tuple[Place, list[DecodedUpdate]]) -> tuple[int, tuple[int, int]]:
        (_, span), findings = item
        keys = [key for finding in findings for key in finding.keys.values()]
        return min([order[key.text] for key in keys if key.stem] or [order[key.text] for key in keys]), span or (0, 0)

    return sorted(by_place.items(), key=position)


def _layout(findings: Sequence[DecodedUpdate]) -> str:
    """Return a target's layout.

    The result is the layout of the target's main update, with one exception. If another update replaces the target's
    weight, and the new weight's shape shows another layout, the result is the new weight's layout.
    """
    if len(findings) == 1 and "weight" not in findings[0].update.tensor_fields():
        return findings[0].layout
    acting = next((finding for finding in findings if not isinstance(finding.update, Replacement)), None)
    if acting is None:
        return next((finding.layout for finding in findings if finding.layout != "out *in"), "out *in")
    whole = next((f.update.tensors["weight"] for f in findings if "weight" in f.update.tensors), None)
    if whole is None or acting.layout.startswith("e "):
        return acting.layout
    dims = acting.update.dims()
    out, in_ = dims.get("out"), dims.get("in")
    proofs: dict[Any, str] = {(out, in_): "out *in", (in_, out): "in out *k"}
    if len(proofs) < 2:
        return acting.layout
    return proofs.get(tuple(whole.shape[:2]), acting.layout)


def _in_layout(finding: DecodedUpdate, target: Target) -> Update:
    update = finding.update
    if isinstance(update, Replacement) and update.weight is not None:
        return update.replace(weight=stored(as_lazy(update.weight), target.layout))
    return update


def _departures(
    updates: Updates, places: Places, tensors: Mapping[str, Lazy], prefix: str, peft_type: str
) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Return `PeftHints.keys` and `PeftHints.shapes`: keys and shapes that the writer would not choose by itself."""
    keys: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    if peft_type == "LORA" and are_plain(updates):
        for target, (keys_of_update,) in places.items():
            for name, own_key in keys_of_update.items():
                spelled = f"{prefix}{target.path}.lora_{name}.weight"
                if own_key.text != spelled:
                    keys[spelled] = own_key.text
        return keys, shapes
    for target, position, parts in spell_updates(updates, peft_type, prefix):
        keys_of_update = places[target][position]
        for field, spelled, leaf, guessed in parts:
            key = keys_of_update.get(field)
            if key is None:
                continue
            if key.text != spelled or guessed:
                keys[spelled] = key.text
            shape = tensors[key.text].shape
            if shape != leaf.shape:
                shapes[key.text] = list(shape)
    return keys, shapes
