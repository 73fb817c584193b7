"""Encode an `Adapter` as a config and tensors, and check that PEFT's format reads them back as the same updates."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ...errors import AdapterkitError, Unrepresentable
from ...io.lazy import Lazy, as_lazy, as_torch
from ...methods.ia3 import IA3
from ...methods.olora import OLoRA
from ...methods.replacement import Replacement
from ...methods.rows import Rows
from .._format import FORMULA
from .._joining import with_joined_rows, with_one_lora
from .._losses import Loss, expressible
from . import config as fields
from .alphas import Scale
from .alphas import number_fields as scale_fields
from .compose import configs, token_numbers
from .experts import factor_in, in_order_of
from .families import FAMILIES, family_of, family_of_method, family_of_type
from .file import File
from .hints import FORMAT, PeftHints, fingerprint, hints_of
from .keys import parse_key, parse_keys, prefix_of
from .losses import acting_method, find_losses, without_encoders
from .pairs import BESIDE, OUTPUT_TIMES, PAIRS, rank_of
from .reader import Places, assemble
from .spelling import Spelled, config_name, is_parameter, lora_paths, spell, stored

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy, Leaf
    from ...io.strict_json import JsonValue
    from .hints import PeftHints


def says(
    config: Mapping[str, JsonValue],
    tensors: Mapping[str, Lazy],
    spelled: Iterable[Spelled],
    updates: Updates,
    base: Checkpoint | None,
    omitted: Collection[str] = (),
    compat: str | None = None,
) -> bool:
    """Whether reading this config and these tensors as PEFT's format would yield these updates.

    Args:
        config: the config.
        tensors: the tensors by key, including tensors that are not in the file.
        spelled: the same tensors, with their targets and fields.
        updates: the updates that reading must yield.
        base: the base, or None.
        omitted: the keys of tensors that are not in the file.
        compat: the `compat` with which the file will be read.
    """
    written = json.loads(json.dumps(config, sort_keys=True))
    try:
        held = {key: tensor for key, tensor in tensors.items() if key not in omitted}
        prefix, keys = parse_keys(held, prefix_of(str(config["peft_type"])))
        stems = {parse_key(each.key, prefix).stem: each.place[0].path for each in spelled}
        known = {target.path: update for target, found in updates.items() for update in found if family_of(update)}
        out = {parse_key(key, prefix).word: tensors[key] for key in omitted}
        file = File(fields.parse(written), keys, base, compat, parameters=stems, omitted=out, known=known)
        read, places, _ = assemble(file)
    except AdapterkitError:
        return False
    own = _own(places, file)
    return _content(read, own) == _content(updates, own)


def _own(places: Places, file: File) -> dict[tuple[str, int], set[str]]:
    """Map (path, index of an update) to the fields whose keys are not chosen among several shared keys."""
    family = family_of_type(file.settings.peft_type)
    several = {key.text for word, key in file.shared.items() if family and word not in family.shared}
    own: dict[tuple[str, int], set[str]] = {}
    for target, held in places.items():
        for position, keys in enumerate(held):
            fields = {field for field, key in keys.items() if key.text not in several}
            if fields:
                own.setdefault((target.path, position), set()).update(fields)
    return own


def _content(updates: Updates, own: Mapping[tuple[str, int], Collection[str]]) -> Mapping[object, object]:
    """Return everything about updates that a wrong config could change: targets, methods, values, shapes, token ids.

    A float tensor with its own key is represented only by its dtype. A tensor that the reader computes, or selects
    among several shared tensors, is represented by its values.
    """
    return {
        (target.path, target.rows, target.stacked): [
            _outline(update, target.layout, own.get((target.path, position), ()))
            for position, update in enumerate(found)
        ]
        for target, found in updates.items()
    }


def _outline(update: Update, layout: str, own: Collection[str]) -> tuple[object, ...]:
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    if isinstance(update, Replacement) and "weight" in leaves:
        leaves["weight"] = stored(leaves["weight"], layout)
    shapes = {name: (leaf.shape, _values(leaf, name in own)) for name, leaf in leaves.items()}
    return update.method, update.attributes, shapes


def _values(leaf: Lazy, own: bool) -> object:
    if not leaf.dtype.floating:
        return leaf.numpy().tolist()
    return leaf.dtype.name if own else (leaf.dtype.name, bytes(leaf.fetch()))


def encode(
    adapter: Adapter, *, on_loss: str, base: Checkpoint | None
) -> tuple[Mapping[str, JsonValue], dict[str, Lazy], list[str]]:
    """Return the config, the tensors by key, and one line for each omitted or rewritten update.

    Raises:
        Unrepresentable: a PEFT file cannot express an update, and `on_loss` does not allow rewriting or omitting the
            update.
    """
    hints = hints_of(adapter)
    by_formula = hints.compat == FORMULA
    plain, computed = without_encoders(adapter.updates) if on_loss == "fold" else (adapter.updates, [])
    whole, joined = with_joined_rows(plain, base)
    whole, twice = with_one_lora(whole)
    joined += twice
    updates, lines = expressible(
        _as_stored(whole), lambda held: [*find_losses(held, base, by_formula)] or _guesses(held, hints, base),
        dialect="PEFT", place="a PEFT file", on_loss=on_loss,
    )  # fmt: skip
    peft_type = _peft_type(updates, hints)
    if not hints.config:
        hints = msgspec.structs.replace(hints, prefix=prefix_of(peft_type))
    updates, numbers, folded = number_fields(updates, hints, on_loss)
    spelled = _spell(updates, hints, peft_type, base)
    tensors, kept = _by_key(spelled, updates), _kept(adapter, updates, hints)
    for plain_config in configs(adapter, updates, hints, peft_type, numbers, base):
        config = in_order_of(plain_config, hints.experts_order, updates)
        omitted = _omitted(config, spelled, updates, peft_type)
        if says(config, kept | tensors, spelled, updates, base, omitted, hints.compat):
            written = {key: tensor for key, tensor in tensors.items() if key not in omitted}
            return config, kept | written, computed + joined + lines + folded
    places = [(target, position) for target, found in updates.items() for position in range(len(found))]
    cure = "Write adapterkit's format: --to adapterkit (format='adapterkit')"
    raise Unrepresentable("PEFT's config cannot express this combination", cure=cure, places=places)


def _as_stored(updates: Updates) -> dict[Target, tuple[Update, ...]]:
    """Return the same updates, with replaced weights in the order in which the base stores them."""
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, found in updates.items():
        if target.layout == "out *in" or not all(isinstance(update, Replacement) for update in found):
            changed[target] = found
        else:
            changed[replace(target, layout="out *in")] = tuple(_turned(update, target.layout) for update in found)
    return changed


def _turned(update: Update, layout: str) -> Update:
    weight = update.tensors.get("weight")
    return update if weight is None else update.replace(weight=stored(as_lazy(weight), layout))


def _guesses(updates: Updates, hints: PeftHints, base: Checkpoint | None) -> Iterator[Loss]:
    paths, pairs = lora_paths(updates), all(isinstance(u, PAIRS) for found in updates.values() for u in found)
    if pairs and all(target.layout == "out *in" and not is_parameter(target, paths, base) for target in updates):
        return
    spelled = spell(updates, "LORA", hints.prefix, base)
    for target, position in dict.fromkeys(s.place[:2] for s in spelled if s.guessed and s.key not in hints.keys):
        why = "the order of this module's parameters" if target.stacked else "whether this is an embedding or a Conv1D"
        yield target, position, f"its keys depend on {why}, which is unknown"


def _peft_type(updates: Updates, hints: PeftHints) -> str:
    method = acting_method(updates)
    if method is not None:
        own = {} if method in BESIDE else {n: f.peft_type for n, f in FAMILIES.items() if method in f.methods()}
        read = hints.config.get("peft_type")
        # If several types have the method, prefer the source file's type, and then the type that is named after the
        # method.
        named = own.get(method.__module__.rpartition(".")[2]) or next(iter(own.values()), None)
        return str(read) if read in own.values() else named or ("IA3" if method is IA3 else "LORA")
    numbers = [token_numbers(t, updates) for t, us in updates.items() if any(isinstance(u, Rows) for u in us)]
    read = hints.config.get("peft_type")
    if read == "LN_TUNING" and not numbers:
        return "LN_TUNING"
    alone = read == "TRAINABLE_TOKENS" or (read != "LORA" and len(numbers) == len(updates))
    return "TRAINABLE_TOKENS" if numbers and alone and all(n == numbers[0] for n in numbers) else "LORA"


def _spell(updates: Updates, hints: PeftHints, peft_type: str, base: Checkpoint | None) -> list[Spelled]:
    """Return every tensor as PEFT stores it, with the key and the shape that the source file has, if known."""
    spelled = []
    for each in spell(updates, peft_type, hints.prefix, base):
        key = hints.keys.get(each.key, each.key)
        target, position, name = each.place
        if target.stacked and hints.experts_order and name in ("A", "B"):
            each = replace(each, leaf=factor_in(hints.experts_order, name, target, updates[target][position]))
        shape = hints.shapes.get(key, each.leaf.shape)
        fits = math.prod(shape) == math.prod(each.leaf.shape)
        spelled.append(replace(each, key=key, leaf=each.leaf.reshape(*shape) if fits else each.leaf))
    return spelled


def _by_key(spelled: list[Spelled], updates: Updates) -> dict[str, Lazy]:
    """Return the tensors by key.

    A tensor that several updates share is written once, and must be equal in all updates.
    """
    first: dict[str, Any] = {}
    tensors: dict[str, Lazy] = {}
    for each in spelled:
        target, position, field = each.place
        leaf = updates[target][position].tensors[field.partition(".")[0]]
        if first.setdefault(each.key, leaf) is not leaf and tensors[each.key].fetch() != each.leaf.fetch():
            cure = "Write adapterkit's format, which stores a tensor for each: --to adapterkit (format='adapterkit')"
            why = "a PEFT file shares this tensor among all modules"
            raise Unrepresentable(why, items=[each.key], cure=cure, places=[(target, position)])
        tensors.setdefault(each.key, each.leaf)
    return tensors


def _omitted(config: Mapping[str, JsonValue], spelled: list[Spelled], updates: Updates, peft_type: str) -> set[str]:
    """Return the keys of tensors that a file with this config does not contain."""
    family = family_of_type(peft_type)
    left_out = family.omitted(config, updates) if family else ()
    return {each.key for each in spelled if each.place[2] in left_out}


def _kept(adapter: Adapter, updates: Updates, hints: PeftHints) -> dict[str, Lazy]:
    """Return the stored tensors that belong to no update, if their module still has a target."""
    if adapter.foreign is None or adapter.foreign.format != FORMAT:
        return {}
    paths, same = {target.path for target in updates}, hints.targets == fingerprint(updates)
    keys = {text: parse_key(text, hints.prefix) for text in adapter.foreign.tensors}
    kept = [text for text, key in keys.items() if same or not key.part or key.path in paths]
    return {text: as_lazy(adapter.foreign.tensors[text]) for text in kept}


# Write ranks and scalings as config fields: one rank and one alpha for most modules, patterns for all others.
# PEFT's config has no scaling: PEFT divides alpha by the rank or by the root of the rank. The writer searches for an
# alpha that yields exactly the scaling. If there is no such alpha, the scaling is folded into B, if the caller allows
# folding.


def number_fields(updates: Updates, hints: PeftHints, on_loss: str) -> tuple[Updates, dict[str, JsonValue], list[str]]:
    """Return the fields for ranks and scalings. If allowed, fold scalings into B for which there is no exact alpha."""
    updates, lines = _family_folded(updates, on_loss)
    if lines:
        return updates, {}, lines
    first, paths = hints.config.get("use_rslora") is True, lora_paths(updates)
    once = hints.compat == FORMULA
    scales, unlike = _scales(updates, once)
    numbers, inexact = scale_fields(scales, (first, not first))
    inexact += unlike
    if not inexact:
        return updates, numbers, []
    needy = [target for target in updates if target.path in paths and config_name(target, paths) in inexact]
    items = [f"{target}: no alpha yields its exact scaling" for target in needy]
    if on_loss not in ("fold", "promote") or any(isinstance(u, OLoRA) for target in needy for u in updates[target]):
        raise Unrepresentable(
            "PEFT states a scaling as alpha / r",
            items=items,
            cure="Allow folding the scaling into B with --on-loss fold (on_loss='fold')",
        )
    changed = {
        t: tuple(_folded(update, _times_added(t, paths, once)) for update in found) if t in needy else found
        for t, found in updates.items()
    }
    numbers, _ = scale_fields(_scales(changed, once)[0], (first, not first))
    return changed, numbers, [f"folded the scaling into B of {target}" for target in needy]


def _family_folded(updates: Updates, on_loss: str) -> tuple[Updates, list[str]]:
    """Fold scalings that a family's config cannot express into a tensor of the update."""
    method = acting_method(updates)
    family = family_of_method(method)
    needy = family.inexact(updates) if family else []
    if family is None or not needy:
        return updates, []
    items = [f"{path}: no alpha yields its exact scaling" for path in needy]
    if on_loss not in ("fold", "promote"):
        raise Unrepresentable(
            "PEFT states a scaling as alpha / r",
            items=items,
            cure="Allow folding the scaling into a factor with --on-loss fold (on_loss='fold')",
        )

    def folded(update: Update) -> Update:
        field = next((name for name in family.folds if name in update.tensors), None)
        if type(update) not in family.methods() or field is None:
            return update
        scaled = _times(update.tensors[field], update.attributes["scaling"])
        return update.replace(scaling=1.0, **{field: scaled})

    changed = {t: tuple(map(folded, found)) if t.path in needy else found for t, found in updates.items()}
    return changed, [f"folded the scaling into a factor of {path}" for path in needy]


def _scales(updates: Updates, once: bool) -> tuple[dict[str, Scale], list[str]]:
    """Return (rank, scaling) by the name in the config, and the attentions whose projections need different alphas."""
    paths, scales, unlike = lora_paths(updates), dict[str, Scale](), dict[str, None]()
    for target, found in updates.items():
        for update in (update for update in found if isinstance(update, PAIRS)):
            scaling = float(cast(Any, update).scaling) / _times_added(target, paths, once)
            scale, name = (rank_of(update, target.stacked), scaling), config_name(target, paths)
            if scales.setdefault(name, scale) != scale:
                unlike[name] = None
    return scales, list(unlike)


def _times_added(target: Target, paths: Collection[str], once: bool) -> float:
    """Return how many times PEFT's forward adds the change of a target; 1 with `once`, as in the paper's formula."""
    inside = config_name(target, paths) != target.path and target.path.endswith(".out_proj")
    return OUTPUT_TIMES if inside and not once else 1.0


def _folded(update: Update, scaling: float) -> Update:
    """Give an update another scaling without changing its function: rescale B and the bias, and round them once."""
    if not isinstance(update, PAIRS) or isinstance(update, OLoRA):
        return update
    scaled = {name: update.tensors[name] for name in ("B", "B_blocks", "bias") if name in update.tensors}
    factor = update.scaling / scaling
    return update.replace(scaling=scaling, **{name: _times(leaf, factor) for name, leaf in scaled.items()})


def _times(leaf: Leaf, scaling: float) -> Leaf:
    import torch

    whole = as_torch(leaf)
    return (whole.to(torch.float64) * scaling).to(whole.dtype)
