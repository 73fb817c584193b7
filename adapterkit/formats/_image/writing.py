"""Write a file of an image format: select the updates that the format can express, and encode them as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...core.metadata import with_metadata
from ...errors import WRITE_ADAPTERKIT, Unrepresentable
from ...io.lazy import Lazy, as_lazy
from ...methods.dora import DoRA
from ...methods.loha import LoHa
from ...methods.lokr import LoKr
from ...methods.lora import LoRA
from ...methods.weight_norm import WeightNorm
from ...naming.image import component_of
from .bundles import keyed
from .deciding import CONTROLNET, FAMILY, candidates, denoiser_targets, origin_of
from .file import rules_at, rules_for
from .hints import ImageHints, fingerprint, hints_of, still
from .image_format import kernel_of, mixed_biases
from .slots import NO_SLOT_FOR_SCALING, ONE_CHANGE, changes_weight, encode, rewritten, why_not, without_effect
from .underscores import TargetPaths

if TYPE_CHECKING:
    from pathlib import Path

    from ...core.adapter import Adapter, Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from .deciding import Origin
    from .file import Metadata, Rules, StoredTensor
    from .image_format import ImageFormat


def encoded(
    image_format: ImageFormat, adapter: Adapter, file: Path, on_loss: str, base: Checkpoint | None
) -> tuple[dict[str, Lazy], Metadata, list[str]]:
    """Return the tensors and the metadata of the file to write, and one line for each omitted or rewritten update.

    Raises:
        Unrepresentable: the format cannot express an update, and `on_loss` allows neither rewriting nor omitting this
            update. Or tensors of two updates would have the same key.
    """
    hints = hints_of(adapter, image_format.name())
    rules = rules_for(image_format.rules_in(file, hints), hints.compat, dict(hints.metadata) if hints.stems else {})
    kept = {} if not hints.stems or adapter.foreign is None else adapter.foreign.tensors
    origin = origin_of(adapter, base)
    given, tensors = keyed(adapter.updates, hints, origin) if image_format.bundles else (adapter.updates, {})
    updates, lines = _expressible(image_format, rules, given, hints, origin, on_loss)
    stems = _stems(image_format, updates, hints)
    metadata, stated = image_format.metadata(updates, hints, {str(t): stems[t, 0] for t in updates})
    metadata = with_metadata(metadata, adapter)
    changed = not hints.stems or (bool(adapter.recipe) and adapter.recipe[-1].op != "read")
    if changed and "ss_network_module" in dict(metadata):
        metadata += _ranks(updates)
    if not hints.stems:
        metadata += _family(adapter.updates, origin)
    for target, group in updates.items():
        for position, update in enumerate(group):
            there = rules_at(rules, stems[target, position])
            for stored in encode(update, there, kernel_of(target, base)):
                for key, leaf in _stored(
                    image_format, rules, stems[target, position], stored, update, hints, kept, stated
                ).items():
                    if key in tensors and not _same(stored, tensors[key], leaf):
                        why = f"two updates would have tensors with the same key {key}"
                        raise Unrepresentable(why, cure=WRITE_ADAPTERKIT)
                    tensors[key] = leaf
    written = {str(target) for target in updates}
    tensors |= {k: as_lazy(kept[k]) for k, target in hints.idle.items() if k in kept and target in written}
    return tensors, metadata, lines


def _family(updates: Updates, origin: Origin) -> Metadata:
    """Return the metadata entry with the names of the model families to which the adapter may belong."""
    targets = denoiser_targets(updates, ())
    known = [family.name for family in candidates(updates, targets, origin)] if targets else []
    return [(FAMILY, " ".join(known))] if known else []


def _ranks(updates: Updates) -> Metadata:
    """Return sd-scripts' metadata for rank and alpha. If modules have different values, the entry is `Dynamic`.

    If an update is neither a LoRA nor a DoRA, return an empty list.
    """
    each = [update for group in updates.values() for update in group]
    pairs = [(update.A.shape[0], update.scaling) for update in each if isinstance(update, (DoRA, LoRA))]
    if not pairs or len(pairs) < len(each):
        return []
    ranks = {rank for rank, _ in pairs}
    alphas = {rank * scaling for rank, scaling in pairs}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alpha = f"{alphas.pop():.9g}" if len(alphas) == 1 else "Dynamic"
    return [("ss_network_dim", dim), ("ss_network_alpha", alpha)]


def _stored(
    image_format: ImageFormat,
    rules: Rules,
    stem: str,
    stored: StoredTensor,
    update: Update,
    hints: ImageHints,
    kept: Mapping[str, object],
    alpha_stated: bool,
) -> dict[str, Lazy]:
    """Return a map from keys to the tensors that the writer stores for one slot.

    If the source file's tensors still give the update's value for this slot, the map contains the source tensors.
    """
    default = image_format.spell(stem, stored.slot)
    key, leaf = hints.keys.get(default, default), as_lazy(stored.leaf)
    if stored.field:
        sources = _sources(image_format, stem, stored, hints, kept)
        if sources and all(hints.derived[k] == fingerprint(leaf) for k in sources):
            return sources
        shape = hints.shapes.get(key)
        return {key: leaf.reshape(*shape) if shape and math.prod(leaf.shape) == math.prod(shape) else leaf}
    if key in kept:
        old = as_lazy(kept[key])  # type: ignore[arg-type]
        if stored.slot != "alpha" or still(old, leaf, update, rules):
            return {key: old}
    if stored.slot != "alpha" or key in kept:
        return {key: leaf}
    spared = stem in hints.without_alpha or not image_format.rules.alpha_needed
    return {} if alpha_stated or (spared and getattr(update, "scaling", 1.0) == 1.0) else {key: leaf}


def _sources(
    image_format: ImageFormat, stem: str, stored: StoredTensor, hints: ImageHints, kept: Mapping[str, object]
) -> dict[str, Lazy]:
    """Return the source file's `down` and `mid` if the reader computed A from both; otherwise an empty dict."""
    if stored.slot != "down" or not hints.derived:
        return {}
    keys = [hints.keys.get(k, k) for k in (image_format.spell(stem, "down"), image_format.spell(stem, "mid"))]
    return {k: as_lazy(kept[k]) for k in keys if k in kept and k in hints.derived}  # type: ignore[arg-type]


def _stems(image_format: ImageFormat, updates: Updates, hints: ImageHints) -> dict[tuple[Target, int], str]:
    paths = TargetPaths(target.path for target in updates)
    stems: dict[tuple[Target, int], str] = {}
    for target, each in updates.items():
        for position, update in enumerate(each):
            stem = hints.stems.get(str(target)) or image_format.stem(target, paths, update)
            assert stem is not None
            stems[target, position] = stem
    return stems


def _expressible(
    image_format: ImageFormat, rules: Rules, updates: Updates, hints: ImageHints, origin: Origin, on_loss: str
) -> tuple[Updates, list[str]]:
    """Return the updates that the file can express, and a line for each omitted or rewritten update."""
    updates, idle = without_effect(updates, rules)
    updates, lines = rewritten(image_format.prepared(updates), rules, on_loss)
    lines = [*idle, *lines]
    places = [(t, i) for t, group in updates.items() for i, u in enumerate(group) if why_not(u, rules)]
    before = updates
    updates, losses = image_format.renamed(updates, hints.stems, origin, fold=on_loss in ("fold", "promote"))
    # The caller can convert the updates at `places` to LoRAs. To rename a target, `renamed` may have to join the
    # target's updates with other updates, and only LoRAs can be joined. So if a target was not renamed, add its
    # updates to `places`, except the LoRAs.
    lost = {target for target, _ in losses if target in before}
    places += [(t, i) for t in before if t in lost for i, u in enumerate(before[t]) if not isinstance(u, LoRA)]
    # Or to one weight difference, or one LoRA, if the updates of a target can be added.
    places += [(t, i) for t, group in before.items() if _is_several(group) for i in range(len(group))]
    named = not losses
    losses += list(_losses(image_format, rules, updates, hints))
    items = [f"{target}: {why}" for target, why in dict.fromkeys(losses)]
    if items and on_loss != "drop":
        cure = (
            "Omit them with --on-loss drop (on_loss='drop'), or write adapterkit's format: --to adapterkit"
            if named
            else _keeping(origin)
        )
        if all(why.endswith(NO_SLOT_FOR_SCALING) for _, why in losses):
            cure = f"Fold the scaling into a factor (one rounding) with --on-loss fold (on_loss='fold'). Or: {cure}"
        why = f"{image_format.name()} cannot express these updates"
        raise Unrepresentable(why, items=items, cure=cure, places=places)
    lost = {target for target, _ in losses}
    kept = {target: group for target, group in updates.items() if target not in lost}
    if not kept:
        why = f"a file of {image_format.name()} can express none of the adapter's updates"
        raise Unrepresentable(why, items=items, cure=WRITE_ADAPTERKIT)
    return kept, [*lines, *(f"left out {item}" for item in items)]


def _keeping(origin: Origin) -> str:
    """Return the cure for the error that module names cannot be translated."""
    keeps = {"native": "comfyui", "comfyui": "comfyui", "diffusers": "diffusers"}.get(origin.naming, "adapterkit")
    return (
        f"Write a format that keeps these names: --to {keeps}. Or name the model family when you read the adapter: "
        "--family (family=). Or pass --base BASE (base=), so that the base's names decide the family"
    )


def _losses(
    image_format: ImageFormat, rules: Rules, updates: Updates, hints: ImageHints
) -> Iterable[tuple[Target, str]]:
    paths = TargetPaths(target.path for target in updates)
    yield from mixed_biases(
        updates,
        lambda target, update: image_format.switch(
            hints.stems.get(str(target)) or image_format.stem(target, paths, update) or ""
        ),
    )
    for target, group in updates.items():
        slots: set[str] = set()
        before: Update | None = None
        for update in group:
            why = image_format.why_not(target, update, rules)
            if not why and target.stacked:
                why = "its target is a stack of experts"
            if not why and target.layout != "out *in":
                why = f"the format has no {update.method} on a weight stored as {target.layout}"
            if not why and str(target) not in hints.stems and image_format.stem(target, paths, update) is None:
                why = "it changes only some rows" if target.rows else "its module is not in an image model"
                if component_of(target.path) == CONTROLNET:
                    why = "its module is in a ControlNet, for which this format has no prefix"
                if component_of(target.path) == "transformer_2":
                    why = "its module is in a second transformer, for which this format has no prefix"
            if isinstance(update, WeightNorm) and not isinstance(before, (LoHa, LoKr, LoRA)):
                why = "its weight_norm does not come directly after a LoRA, a LoHa or a LoKr"
            before = update
            if not why:
                update_slots = {stored.slot for stored in encode(update, rules)}
                why = "the module has several updates of the same method" if update_slots & slots else ""
                why = f"{ONE_CHANGE} updates" if _is_several(group) else why
                slots |= update_slots
            if why:
                yield target, why


def _is_several(group: Sequence[Update]) -> bool:
    """Whether more than one update changes the weight by itself."""
    return sum(map(changes_weight, group)) > 1


def _same(stored: StoredTensor, one: Lazy, other: Lazy) -> bool:
    """Whether two tensors for the same key are equal alphas. The updates of a module's parts may share one alpha."""
    return stored.slot == "alpha" and (one.dtype, bytes(one.fetch())) == (other.dtype, bytes(other.fetch()))
