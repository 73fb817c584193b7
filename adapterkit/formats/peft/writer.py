"""Encode an `Adapter` as a config and tensors, or list the updates that PEFT's format cannot express."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ...core.updates import ContextUpdate
from ...errors import WRITE_ADAPTERKIT, AdapterkitError, Unrepresentable
from ...io.lazy import Lazy, as_array, as_lazy, as_torch
from ...methods._low_rank import AcrossGroups
from ...methods.dora import DoRA
from ...methods.grouped_dora import GroupedDoRA
from ...methods.ia3 import IA3
from ...methods.lora import LoRA
from ...methods.olora import OLoRA
from ...methods.replacement import Replacement
from ...methods.rows import Rows
from .._format import FORMULA
from .._joining import with_joined_rows, with_one_lora
from .._kit import Loss, all_expressible
from . import config as fields
from .factors import factor_in, in_order_of
from .families import (
    BESIDE,
    BIASED,
    FAMILIES,
    LINEAR,
    OUTPUT_TIMES,
    PAIRS,
    RESIDUAL,
    ROUTED,
    family_of,
    family_of_method,
    family_of_type,
    may_stand,
    rank_of,
    why_not_there,
)
from .file import FORMAT, File, PeftHints, fingerprint, hints_of, make, parse_key, parse_keys, prefix_of
from .patterns import Scale
from .patterns import number_fields as scale_fields
from .reader import Places, assemble
from .spelling import (
    Spelled,
    config_name,
    configs,
    is_embedding,
    is_parameter,
    lora_paths,
    spell,
    stored,
    token_numbers,
)

if TYPE_CHECKING:
    import torch

    from ...core.adapter import Adapter, Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Leaf
    from ...io.strict_json import JsonValue


# Find the updates that a PEFT file cannot express, before the file is written.


PLAIN = {"embeddings": "prompt", "past": "prefix"}
"""For each `place` of a context update with a network, the method that stores the network's output."""


def has_encoder(update: Update) -> bool:
    """Whether an update is a context update with a network. PEFT's files store only the network's output."""
    return isinstance(update, ContextUpdate) and update.place in PLAIN and family_of(update) is None


def without_encoders(
    updates: Mapping[Target, tuple[Update, ...]],
) -> tuple[dict[Target, tuple[Update, ...]], list[str]]:
    """Replace the networks of context updates with the networks' outputs, and return a line for each replacement."""
    lines = [
        f"{t}: wrote the output of {u.method}'s network, not the network"
        for t, us in updates.items()
        for u in us
        if has_encoder(u)
    ]
    changed = {
        t: tuple(_computed(cast(ContextUpdate, u)) if has_encoder(u) else u for u in us) for t, us in updates.items()
    }
    return changed, lines


def _computed(update: ContextUpdate) -> Update:
    import numpy as np

    dtype = as_lazy(next(iter(update.tensors.values()))).dtype
    wide = update.map(lambda leaf: cast("torch.Tensor", as_array(leaf).astype(np.float64)))
    values = np.ascontiguousarray(getattr(wide, update.place)()).astype(dtype.array)
    P = Lazy(values.shape, dtype, lambda: values.tobytes())
    return make(PLAIN[update.place], {"P": P})


def find_losses(updates: Updates, base: Checkpoint | None, by_formula: bool = False) -> list[Loss]:
    """Return (target, index of the update, one reason) for each update that a PEFT file cannot express.

    If `by_formula`, the written file will be read with the paper's formula instead of PEFT's forward.
    """
    losses_found: dict[tuple[Target, int], str] = {}
    parties = (_biases(updates, base, by_formula), _attentions(updates), _families(updates, base))
    for losses in (_alone(updates, base, by_formula), _together(updates), *parties):
        for target, position, why in losses:
            losses_found.setdefault((target, position), why)
    return [(target, position, why) for (target, position), why in losses_found.items()]


def acting_method(updates: Updates) -> type[Update] | None:
    """Return the most frequent main method (see `_acts`); None if no update has a main method."""
    count = Counter(type(u) for group in updates.values() for u in group if _acts(type(u)))
    return min(count, key=lambda method: (-count[method], _rank(method)), default=None)


def _acts(method: type[Update]) -> bool:
    """Whether a method can be the main method of a file. The main method determines the file's `peft_type`.

    Replacements and token rows cannot be the main method. They may be in a file with or without a main method.
    """
    return method in (*PAIRS, IA3) or family_of_method(method) is not None


def _rank(method: type[Update]) -> int:
    """Return the sort key that breaks ties between main methods that have the same number of updates."""
    if method in BESIDE:
        return [*PAIRS, IA3].index(method)
    return len(BESIDE) + next(i for i, family in enumerate(FAMILIES.values()) if method in family.methods())


def _alone(updates: Updates, base: Checkpoint | None, by_formula: bool) -> Iterator[Loss]:
    method, paths = acting_method(updates), lora_paths(updates)
    for target, group in updates.items():
        for position, update in enumerate(group):
            why = _why_not(target, update, method) or _why_not_there(target, update, paths, base, by_formula)
            if why:
                yield target, position, why


def _why_not(target: Target, update: Update, method: type[Update] | None) -> str:
    if has_encoder(update):
        return f"PEFT cannot store the network of {update.method}; --on-loss fold (on_loss='fold') writes its output"
    family = family_of(update)
    if not (type(update) in BESIDE or family):
        return f"PEFT files cannot store the method {update.method}"
    if _acts(type(update)) and not (may_stand(update, method) or (family and method in family.methods())):
        return f"a PEFT file cannot store both {update.method} and {_name(method)}"
    if isinstance(update, Rows) and method not in (*PAIRS, None):
        return f"the config of {_name(method)} has no field for token rows"
    if target.rows is not None:
        return f"PEFT does not support {update.method} on some rows of a fused weight"
    return ""


def _why_not_there(target: Target, update: Update, paths: set[str], base: Checkpoint | None, by_formula: bool) -> str:
    adapts = isinstance(update, PAIRS)
    if target.stacked and not (isinstance(update, LoRA) and update.bias is None and "." in target.path):
        return "for stacked experts, PEFT supports only LoRA without a bias, on a parameter inside a module"
    if adapts and 0 in next(iter(update.tensors.values())).shape:
        return f"its {update.method} has rank 0"
    if isinstance(update, AcrossGroups) and (len(update.A.shape) < 3 or update.groups == 1):
        return (
            f"{update.method} needs a convolution with groups; "
            f"for another layer, the method must be {update.method.removeprefix('grouped_')}"
        )
    if isinstance(update, GroupedDoRA) and update.regrouped == by_formula:
        norms = "that PEFT's forward computes" if update.regrouped else "of each output over the channels of all groups"
        return f"{update.method} divides by the norms {norms}, but readers of the file would divide by other norms"
    if isinstance(update, (LoRA, DoRA)) and target.layout == "in out *k" and len(update.tensors["A"].shape) > 2:
        return f"PEFT does not support {update.method} on a transposed convolution"
    apart = isinstance(update, (DoRA, AcrossGroups, *LINEAR, *RESIDUAL, *ROUTED))
    if apart and (is_parameter(target, paths, base) or config_name(target, paths) != target.path):
        return f"PEFT does not support {update.method} on a parameter or an attention"
    if isinstance(update, (*RESIDUAL, *ROUTED)) and is_embedding(target):
        return f"PEFT does not support {update.method} on an embedding"
    if why := why_not_there(target, update):
        return why
    if family := family_of(update):
        if not family.empty and _empty(update):
            return f"its {update.method} has a tensor without elements"
        return (
            f"PEFT does not support {update.method} on a parameter"
            if is_parameter(target, paths, base)
            else family.why_not(target, update)
        )
    if isinstance(update, Rows) and (target.path in paths or target.layout != "in out *k"):
        return "PEFT stores the rows of single tokens only for an embedding that has no LoRA"
    return ""


def _together(updates: Updates) -> Iterator[Loss]:
    seen: dict[str, Target] = {}
    for target, group in updates.items():
        if seen.setdefault(target.path, target) != target and target.rows is None:
            yield from (
                (target, position, "another target has the same path, but another layout or other rows")
                for position in range(len(group))
            )
        # PEFT applies replacements first, then main methods, then token rows.
        ranks = [2 if type(update) is Rows else int(_acts(type(update))) for update in group]
        for position in range(1, len(group)):
            if ranks[position] <= max(ranks[:position]):
                yield (
                    target,
                    position,
                    f"PEFT cannot apply {group[position].method} after {group[position - 1].method} on one module",
                )


def _biases(updates: Updates, base: Checkpoint | None, by_formula: bool) -> Iterator[Loss]:
    """Yield the LoRAs whose bias PEFT does not support. If there are none, yield LoRAs that do not fit `lora_bias`.

    A config has one `lora_bias` for all LoRAs. So if some LoRAs have a bias and others have none, the LoRAs of the
    smaller group cannot be written.

    In the input projection of an attention module, PEFT's forward ignores a LoRA's bias. So on this projection, a
    LoRA without a bias fits both groups.
    """
    paths = lora_paths(updates)
    parties: dict[bool, list[Loss]] = {True: [], False: []}
    impossible: list[Loss] = []
    for target, group in updates.items():
        for position, update in enumerate(group):
            if isinstance(update, BIASED):
                has = update.bias is not None
                input_projection = (
                    not by_formula
                    and target.path.endswith(".in_proj_weight")
                    and config_name(target, paths) != target.path
                )
                if input_projection and not has:
                    continue
                where = is_parameter(target, paths, base) or is_embedding(target) or input_projection
                this_one, others = ("has a", "have none") if has else ("has no", "have one")
                if has and where:
                    impossible.append(
                        (target, position, f"PEFT does not support {update.method} with a bias at this target")
                    )
                else:
                    why = f"this {update.method} {this_one} bias, but others {others}"
                    parties[has].append((target, position, why))
    # Do not compare the groups yet. With `--on-loss drop`, this function is called again without the unsupported LoRAs.
    if impossible:
        yield from impossible
    elif parties[True] and parties[False]:
        yield from min(parties[True], parties[False], key=len)


def _attentions(updates: Updates) -> Iterator[Loss]:
    """If the LoRAs of an attention module's two projections differ in rank, yield the second of these LoRAs."""
    paths, first = lora_paths(updates), dict[str, int]()
    for target, group in updates.items():
        for position, update in enumerate(group):
            if isinstance(update, LoRA):
                rank = int(update.A.shape[-2 if target.stacked else 0])
                if first.setdefault(config_name(target, paths), rank) != rank:
                    yield target, position, "its rank differs from the rank of the attention's other projection"


def _families(updates: Updates, base: Checkpoint | None) -> Iterator[Loss]:
    """Yield the updates of the main method's family that cannot be in the same file as the family's other updates.

    For example, a config has one value of each field for all modules, but some updates need different values.
    """
    method = acting_method(updates)
    family = family_of_method(method)
    methods = family.methods() if family else ()
    members = [update for group in updates.values() for update in group if type(update) in methods]
    if family and not family.empty and any(map(_empty, members)):
        # `_alone` reports the updates with empty tensors. With `--on-loss drop`, this function is called again without
        # them.
        return
    for target, why in family.apart(updates, base) if family else ():
        position = next(i for i, update in enumerate(updates[target]) if type(update) in methods)
        yield target, position, why


def _empty(update: Update) -> bool:
    return any(0 in leaf.shape for leaf in update.tensors.values())


def _name(method: type[Update] | None) -> str:
    return "others" if method is None else method.__module__.rpartition(".")[2]


# Encode an `Adapter` as a config and tensors, and check that our reader decodes them to the same updates.


def says(
    config: Mapping[str, JsonValue],
    tensors: Mapping[str, Lazy],
    spelled: Iterable[Spelled],
    updates: Updates,
    base: Checkpoint | None,
    omitted: Collection[str] = (),
    compat: str | None = None,
) -> bool:
    """Whether our reader of PEFT's format would decode this config and these tensors to these updates.

    Args:
        config: the config.
        tensors: the tensors by key, including the tensors whose keys are in `omitted`.
        spelled: the tensors of the updates, with their targets and fields.
        updates: the expected updates.
        base: the base, or None.
        omitted: the keys of tensors that will not be written to the file.
        compat: the `compat` with which the file will be read.
    """
    written = json.loads(json.dumps(config, sort_keys=True))
    try:
        kept = {key: tensor for key, tensor in tensors.items() if key not in omitted}
        prefix, keys = parse_keys(kept, prefix_of(str(config["peft_type"])))
        stems = {parse_key(each.key, prefix).stem: each.place[0].path for each in spelled}
        known = {target.path: update for target, group in updates.items() for update in group if family_of(update)}
        out = {parse_key(key, prefix).word: tensors[key] for key in omitted}
        file = File(fields.parse(written), keys, base, compat, parameters=stems, omitted=out, known=known)
        read, places, _ = assemble(file)
    except AdapterkitError:
        return False
    written_fields = _unshared_fields(places, file)
    return _content(read, written_fields) == _content(updates, written_fields)


def _unshared_fields(places: Places, file: File) -> dict[tuple[str, int], set[str]]:
    """Return, for each update, the names of its fields that have a fixed key.

    The result maps (target's path, index of the update) to these names. The reader computes every other
    field's tensor, or selects it among several shared tensors.
    """
    family = family_of_type(file.settings.peft_type)
    several = {key.text for word, key in file.shared.items() if family and word not in family.shared}
    fields_at: dict[tuple[str, int], set[str]] = {}
    for target, keys_of_updates in places.items():
        for position, keys in enumerate(keys_of_updates):
            fields = {field for field, key in keys.items() if key.text not in several}
            if fields:
                fields_at.setdefault((target.path, position), set()).update(fields)
    return fields_at


def _content(updates: Updates, written_fields: Mapping[tuple[str, int], Collection[str]]) -> Mapping[object, object]:
    """Return the properties of updates that a wrong config could change: targets, methods, values, shapes, token ids.

    A float tensor that has its own key is represented only by its shape and dtype. If the reader computes the tensor,
    or selects it among several shared tensors, its values are included.
    """
    return {
        (target.path, target.rows, target.stacked): [
            _outline(update, target.layout, written_fields.get((target.path, position), ()))
            for position, update in enumerate(group)
        ]
        for target, group in updates.items()
    }


def _outline(update: Update, layout: str, written_fields: Collection[str]) -> tuple[object, ...]:
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    if isinstance(update, Replacement) and "weight" in leaves:
        leaves["weight"] = stored(leaves["weight"], layout)
    shapes = {name: (leaf.shape, _values(leaf, name in written_fields)) for name, leaf in leaves.items()}
    return update.method, update.attributes, shapes


def _values(leaf: Lazy, is_written: bool) -> object:
    if not leaf.dtype.floating:
        return leaf.numpy().tolist()
    return leaf.dtype.name if is_written else (leaf.dtype.name, bytes(leaf.fetch()))


def encode(
    adapter: Adapter, *, on_loss: str, base: Checkpoint | None
) -> tuple[Mapping[str, JsonValue], dict[str, Lazy], list[str]]:
    """Return the config, the tensors by key, and a line for each omitted or rewritten update.

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
    updates, lines = all_expressible(
        _as_stored(whole), lambda adapted: [*find_losses(adapted, base, by_formula)] or _guesses(adapted, hints, base),
        format_name="PEFT", place="a PEFT file", on_loss=on_loss,
    )  # fmt: skip
    peft_type = _peft_type(updates, hints)
    if not hints.config:
        hints = msgspec.structs.replace(hints, prefix=prefix_of(peft_type))
    updates, numbers, folded = number_fields(updates, hints, on_loss)
    spelled = _spell(updates, hints, peft_type, base)
    tensors, kept = _by_key(spelled, updates), _kept(adapter, updates, hints)
    family = family_of_type(peft_type)
    for plain_config in configs(adapter, updates, hints, peft_type, numbers, base):
        config = in_order_of(plain_config, hints.experts_order, updates)
        left_out = family.omitted(config, updates) if family else ()
        omitted = {each.key for each in spelled if each.place[2] in left_out}
        if says(config, kept | tensors, spelled, updates, base, omitted, hints.compat):
            written = {key: tensor for key, tensor in tensors.items() if key not in omitted}
            return config, kept | written, computed + joined + lines + folded
    places = [(target, position) for target, group in updates.items() for position in range(len(group))]
    cure = WRITE_ADAPTERKIT
    raise Unrepresentable("PEFT's config cannot express this combination of updates", cure=cure, places=places)


def _as_stored(updates: Updates) -> dict[Target, tuple[Update, ...]]:
    """Transpose the weights of replacements to the order of axes in which the base stores them."""
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, group in updates.items():
        if target.layout == "out *in" or not all(isinstance(update, Replacement) for update in group):
            changed[target] = group
        else:
            changed[replace(target, layout="out *in")] = tuple(_turned(update, target.layout) for update in group)
    return changed


def _turned(update: Update, layout: str) -> Update:
    weight = update.tensors.get("weight")
    return update if weight is None else update.replace(weight=stored(as_lazy(weight), layout))


def _guesses(updates: Updates, hints: PeftHints, base: Checkpoint | None) -> Iterator[Loss]:
    paths, pairs = lora_paths(updates), all(isinstance(u, PAIRS) for group in updates.values() for u in group)
    if pairs and all(target.layout == "out *in" and not is_parameter(target, paths, base) for target in updates):
        return
    spelled = spell(updates, "LORA", hints.prefix, base)
    for target, position in dict.fromkeys(s.place[:2] for s in spelled if s.guessed and s.key not in hints.keys):
        why = "the order of this module's parameters" if target.stacked else "whether this is an embedding or a Conv1D"
        yield target, position, f"its keys depend on {why}, which is unknown"


def _peft_type(updates: Updates, hints: PeftHints) -> str:
    method = acting_method(updates)
    if method is not None:
        types = {} if method in BESIDE else {n: f.peft_type for n, f in FAMILIES.items() if method in f.methods()}
        read = hints.config.get("peft_type")
        # If several `peft_type`s have the method, prefer the `peft_type` of the source file. The second choice is the
        # `peft_type` of the family that is named after the method.
        named = types.get(method.__module__.rpartition(".")[2]) or next(iter(types.values()), None)
        return str(read) if read in types.values() else named or ("IA3" if method is IA3 else "LORA")
    numbers = [token_numbers(t, updates) for t, us in updates.items() if any(isinstance(u, Rows) for u in us)]
    read = hints.config.get("peft_type")
    if read == "LN_TUNING" and not numbers:
        return "LN_TUNING"
    alone = read == "TRAINABLE_TOKENS" or (read != "LORA" and len(numbers) == len(updates))
    return "TRAINABLE_TOKENS" if numbers and alone and all(n == numbers[0] for n in numbers) else "LORA"


def _spell(updates: Updates, hints: PeftHints, peft_type: str, base: Checkpoint | None) -> list[Spelled]:
    """Return every tensor as PEFT stores it. If the source file is known, use its keys, shapes and order of experts."""
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
    """Return the tensors by key. A tensor that several updates share is written once.

    Raises:
        Unrepresentable: several updates must share a tensor, but its values differ between these updates.
    """
    first: dict[str, Any] = {}
    tensors: dict[str, Lazy] = {}
    for each in spelled:
        target, position, field = each.place
        leaf = updates[target][position].tensors[field.partition(".")[0]]
        if first.setdefault(each.key, leaf) is not leaf and tensors[each.key].fetch() != each.leaf.fetch():
            cure = "Write adapterkit's format, with one tensor for each module: --to adapterkit (format='adapterkit')"
            why = "all modules share this tensor in a PEFT file, but its values differ between the adapter's modules"
            raise Unrepresentable(why, items=[each.key], cure=cure, places=[(target, position)])
        tensors.setdefault(each.key, each.leaf)
    return tensors


def _kept(adapter: Adapter, updates: Updates, hints: PeftHints) -> dict[str, Lazy]:
    """Return the source file's tensors that belong to no update. Omit tensors of modules that are no longer adapted."""
    if adapter.foreign is None or adapter.foreign.format != FORMAT:
        return {}
    paths, same = {target.path for target in updates}, hints.targets == fingerprint(updates)
    keys = {text: parse_key(text, hints.prefix) for text in adapter.foreign.tensors}
    kept = [text for text, key in keys.items() if same or not key.part or key.path in paths]
    return {text: as_lazy(adapter.foreign.tensors[text]) for text in kept}


# Write ranks and scalings as config fields: one rank and one alpha for most modules, patterns for all others.
# PEFT's config has no field for a scaling: PEFT computes it as alpha / r, or alpha / sqrt(r) with `use_rslora`. The
# writer searches for an alpha that yields exactly the scaling. If there is none, and if the caller allows folding, the
# scaling is folded into B.


def number_fields(updates: Updates, hints: PeftHints, on_loss: str) -> tuple[Updates, dict[str, JsonValue], list[str]]:
    """Return the updates, the config fields for ranks and scalings, and a line for each folded scaling.

    A scaling that no alpha yields exactly is folded into B, if `on_loss` allows this.
    """
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
    if any(isinstance(update, OLoRA) for target in needy for update in updates[target]):
        # The scaling cannot be folded into B, because OLoRA also multiplies the term -Q' R' by the scaling.
        cure = WRITE_ADAPTERKIT
        raise Unrepresentable("PEFT computes each scaling from alpha and r", items=items, cure=cure)
    if on_loss not in ("fold", "promote"):
        cure = "Allow folding the scaling into B with --on-loss fold (on_loss='fold')"
        raise Unrepresentable("PEFT computes each scaling from alpha and r", items=items, cure=cure)
    changed = {
        t: tuple(_folded(update, _times_added(t, paths, once)) for update in group) if t in needy else group
        for t, group in updates.items()
    }
    numbers, _ = scale_fields(_scales(changed, once)[0], (first, not first))
    return changed, numbers, [f"folded the scaling into B of {target}" for target in needy]


def _family_folded(updates: Updates, on_loss: str) -> tuple[Updates, list[str]]:
    """Fold each scaling that the family's config cannot express into one of the update's tensors.

    Raises:
        Unrepresentable: the config cannot express a scaling, and `on_loss` does not allow folding.
    """
    method = acting_method(updates)
    family = family_of_method(method)
    needy = family.inexact(updates) if family else []
    if family is None or not needy:
        return updates, []
    items = [f"{path}: no alpha yields its exact scaling" for path in needy]
    if on_loss not in ("fold", "promote"):
        raise Unrepresentable(
            "PEFT computes each scaling from alpha and r",
            items=items,
            cure="Allow folding the scaling into a factor with --on-loss fold (on_loss='fold')",
        )

    def folded(update: Update) -> Update:
        field = next((name for name in family.folds if name in update.tensors), None)
        if type(update) not in family.methods() or field is None:
            return update
        scaled = _times(update.tensors[field], update.attributes["scaling"])
        return update.replace(scaling=1.0, **{field: scaled})

    changed = {t: tuple(map(folded, group)) if t.path in needy else group for t, group in updates.items()}
    return changed, [f"folded the scaling into a factor of {path}" for path in needy]


def _scales(updates: Updates, once: bool) -> tuple[dict[str, Scale], list[str]]:
    """Return (rank, scaling) by `config_name`, and a list of attention modules.

    The list has each attention module whose two projections differ in rank or scaling.
    """
    paths, scales, unlike = lora_paths(updates), dict[str, Scale](), dict[str, None]()
    for target, group in updates.items():
        for update in (update for update in group if isinstance(update, PAIRS)):
            scaling = float(cast(Any, update).scaling) / _times_added(target, paths, once)
            scale, name = (rank_of(update, target.stacked), scaling), config_name(target, paths)
            if scales.setdefault(name, scale) != scale:
                unlike[name] = None
    return scales, list(unlike)


def _times_added(target: Target, paths: Collection[str], once: bool) -> float:
    """Return how many times PEFT's forward adds a target's change; with `once`, return 1, as in the paper's formula."""
    inside = config_name(target, paths) != target.path and target.path.endswith(".out_proj")
    return OUTPUT_TIMES if inside and not once else 1.0


def _folded(update: Update, scaling: float) -> Update:
    """Return an update that has another scaling but computes the same change, up to one rounding of B and the bias."""
    if not isinstance(update, PAIRS) or isinstance(update, OLoRA):
        return update
    scaled = {name: update.tensors[name] for name in ("B", "B_blocks", "bias") if name in update.tensors}
    factor = update.scaling / scaling
    return update.replace(scaling=scaling, **{name: _times(leaf, factor) for name, leaf in scaled.items()})


def _times(leaf: Leaf, scaling: float) -> Leaf:
    import torch

    whole = as_torch(leaf)
    return (whole.to(torch.float64) * scaling).to(whole.dtype)
