"""Read and write bottleneck adapters, Compacter and invertible adapters: configs without an `architecture`.

The module `file` lists the positions of adapters for each model type. This module defines, in this order, the slots in
keys, the configs of new files, and the family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import msgspec

from ....core.adapter import Target, Updates
from ....errors import Malformed, Unsupported
from ....io.lazy import Lazy, as_lazy
from ....linalg.activations import ACTIVATIONS
from ..file import (
    EMBEDDINGS,
    MODELS,
    AdapterHubUpdate,
    SublayerRule,
    check_same,
    hanging,
    make,
    model_type_of,
    standing,
    take,
)
from . import AdapterHubFamily, FamilyFields, Number, count_in

if TYPE_CHECKING:
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubKey, AdapterHubNaming, AdapterHubPart, AdapterHubSettings, Findings


PHM = {
    "W": "W",
    "W_left": "left",
    "W_right": "right",
    "b": "bias",
    "phm_rule": "rule",
    "phm_rule_left": "rule_left",
    "phm_rule_right": "rule_right",
}
"""A map from the slots of a Compacter layer to fields of the update, without the fields' prefix `down_` or `up_`."""

COUPLING = {
    f"{half}.{position}.{leaf}": f"{half}_{way}{'_bias' if leaf == 'bias' else ''}"
    for half in ("F", "G")
    for position, way in ((0, "down"), (2, "up"))
    for leaf in ("weight", "bias")
}
"""A map from the slots of an invertible adapter to fields."""

Words = Mapping[str, Any]
"""The config fields, by name."""


def separate_slots(words: Words) -> dict[str, str]:
    """Return a map from slots to fields, for tensors that adapters do not share."""
    layers = {f"adapter_down.{int(words['ln_before'])}": "down", "adapter_up": "up"}
    if words["phm_layer"]:
        names = [*_rules(words, shared=False), *_factors(words, shared=False), *(["b"] if words["phm_bias"] else [])]
        fields = {f"{layer}.{name}": f"{way}_{PHM[name]}" for layer, way in layers.items() for name in names}
    else:
        fields = {f"{layer}.weight": way for layer, way in layers.items()}
        fields |= {f"{layer}.bias": f"{way}_bias" for layer, way in layers.items()}
    for on, slot, field in (
        (words["ln_before"], "adapter_down.0", "norm_before"),
        (words["ln_after"], "adapter_norm_after", "norm_after"),
        (words["use_gating"], "gate", "gate"),
    ):
        fields |= {f"{slot}.weight": field, f"{slot}.bias": f"{field}_bias"} if on else {}
    scaling = {"learned": "scaling_factor", "channel": "channel_scaling"}.get(str(words["scaling"]))
    return fields | ({"scaling": scaling} if scaling else {})


def shared_slots(words: Words) -> dict[str, tuple[str, ...]]:
    """Return a map from slots to fields, for tensors that all adapters share. One tensor may fill several fields."""
    if not words["phm_layer"]:
        return {}
    slots: dict[str, tuple[str, ...]] = {}
    for name in _rules(words, shared=True):
        slots[name] = (f"down_{PHM[name]}", f"up_{PHM[name]}")
    for way in ("down", "up"):
        slots |= {name.replace("W", f"W_{way}"): (f"{way}_{PHM[name]}",) for name in _factors(words, shared=True)}
    return slots


def words_of(updates: Sequence[Update]) -> dict[str, JsonValue]:
    """Return the config fields that state which tensors an adapter has. All updates must have the same tensor names."""
    tensors = updates[0].tensors
    phm = updates[0].method == "compacter"
    scaling = {"scaling_factor": "learned", "channel_scaling": "channel"}
    factors = [field for field in tensors if field.partition("_")[2] in ("W", "left", "right")]
    return {
        "ln_before": "norm_before" in tensors,
        "ln_after": "norm_after" in tensors,
        "use_gating": "gate" in tensors,
        "scaling": next(
            (word for field, word in scaling.items() if field in tensors), updates[0].attributes["scaling"]
        ),
        "phm_layer": phm,
        "phm_bias": not phm or "down_bias" in tensors,
        "factorized_phm_rule": "down_rule_left" in tensors,
        "factorized_phm_W": not phm or "down_left" in tensors,
        "shared_phm_rule": not phm or _one_rule(updates),
        "shared_W_phm": phm and len(updates) > 1 and all(_is_one(updates, field) for field in factors),
    }


def _one_rule(updates: Sequence[Update]) -> bool:
    """Whether all down and up layers of the updates share one `phm_rule`."""
    ends = [field.removeprefix("down_") for field in updates[0].tensors if field.startswith("down_rule")]
    same = (u.tensors[f"down_{end}"] is u.tensors.get(f"up_{end}") for end in ends for u in updates)
    return all(same) and all(_is_one(updates, f"down_{end}") for end in ends)


def _is_one(updates: Sequence[Update], field: str) -> bool:
    return all(update.tensors.get(field) is updates[0].tensors[field] for update in updates)


def _rules(words: Words, *, shared: bool) -> list[str]:
    if bool(words["shared_phm_rule"]) != shared:
        return []
    return ["phm_rule_left", "phm_rule_right"] if words["factorized_phm_rule"] else ["phm_rule"]


def _factors(words: Words, *, shared: bool) -> list[str]:
    if bool(words["shared_W_phm"]) != shared:
        return []
    return ["W_left", "W_right"] if words["factorized_phm_W"] else ["W"]


# A new config states the settings of all bottleneck adapters, the kinds of positions that have adapters, and the layers
# that have no adapters. In all other layers, the adapters library creates an adapter at every position of these kinds.
# If the file has no tensors for such a position, the new adapter there is untrained, and changes the model's output. So
# the updates must cover all these positions. The writer needs the base, because only the base shows the number of
# layers.


FRESH = {
    "dropout": 0.0,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "learn_phm": True,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "stochastic_depth": 0.0,
}
"""Config fields that have the same value in every new config."""

SAME = ("adapter_residual_before_ln", "non_linearity", "original_ln_after", "original_ln_before")
"""Attributes of an update that a config stores unchanged, under the same names."""

FLAGS = ("mh_adapter", "output_adapter", "cross_adapter")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")
ENCODER_DECODER = ("bart", "mbart", "mt5", "plbart", "t5", "whisper")


def placed(updates: Updates) -> list[tuple[Target, Update]]:
    """List (target, update) for every adapter inside a block. An invertible adapter is not inside a block."""
    return [(target, update) for target, group in updates.items() for update in group if update.method != "invertible"]


def forms(updates: Updates) -> list[list[tuple[Target, Update]]]:
    """Group the result of `placed` by method and tensor names. In a union, each group has its own config."""
    groups: dict[Any, list[tuple[Target, Any]]] = {}
    for target, update in placed(updates):
        groups.setdefault((update.method, frozenset(update.tensors)), []).append((target, update))
    return list(groups.values())


def compose(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the config fields for these updates."""
    adapters = placed(updates)
    some, words = adapters[0][1], words_of([update for _, update in adapters])
    flags = {stack_rule.flag for _, stack_rule in _stack_rules(updates, base).values()}
    rule = some.tensors.get("down_rule", some.tensors.get("down_rule_left"))
    factors = {str(_layer(target, base)): _factor(*_sizes(update)) for target, update in adapters}
    return {
        **words,
        **{name: some.attributes[name] for name in SAME},
        **{flag: flag in flags for flag in FLAGS},
        "residual_before_ln": {"true": True, "false": False}.get(some.attributes["residual_before_ln"], "post_add"),
        "is_parallel": some.attributes["parallel"],
        "leave_out": sorted({*range(_layers(base))} - {_layer(target, base) for target, _ in adapters}),
        **_coupling(updates),
        "phm_dim": 4 if rule is None else int(rule.shape[0]),
        "phm_rank": int(some.tensors["down_left"].shape[2]) if "down_left" in some.tensors else 1,
        "reduction_factor": next(iter(factors.values())) if len(set(factors.values())) == 1 else factors,
    }


def losses(updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
    """Yield (target, index of the update, reason) for each update that a new config cannot express."""
    first = next((_form(update) for _, update in placed(updates)), None)
    model_type = model_type_of(base)
    rules = _stack_rules(updates, base)
    patchy, uneven = _patchy(rules, base), _uneven(placed(updates), base)
    for target, group in updates.items():
        for position, update in enumerate(group):
            if update.method == "invertible":
                alone = "this version writes an invertible adapter only together with bottleneck adapters"
                why = _why_no_coupling(target, update, model_type) if first else alone
            elif model_type not in MODELS or not _layers(base):
                why = (
                    "a config lists the layers without adapters, and only the base shows the number of layers and the "
                    "model type; pass --base BASE (base=)"
                )
            elif target not in rules:
                why = f"the adapters library has no adapters at this position of a {model_type} model"
            elif _form(update) != first:
                why = (
                    "its method, sizes or settings differ from the first update, but one config applies to all updates"
                )
            elif not {"down_bias", "up_bias"} <= {*update.tensors, *_unbiased(update)} or _bare_gate(update):
                why = "its down projection, up projection or gate has no bias, but AdapterHub's format requires one"
            elif _layer(target, base) in patchy:
                why = "its layer lacks an adapter at a position where other layers have one"
            elif _layer(target, base) in uneven:
                why = "its layer has adapters with different bottleneck sizes, but a config has one size per layer"
            else:
                why = "the target has a second adapter" if position else ""
            if why:
                yield target, position, f"{update.method}: {why}"


def _stack_rules(updates: Updates, base: Checkpoint | None) -> dict[Target, tuple[str, SublayerRule]]:
    model_type = model_type_of(base)
    rules = {
        target: hanging(target.path, u.attributes["residual"], u.attributes["norm"], model_type)
        for target, u in placed(updates)
    }
    return {target: rule for target, rule in rules.items() if rule is not None}


def _patchy(rules: Mapping[Target, tuple[str, SublayerRule]], base: Checkpoint | None) -> set[int]:
    """Return the indices of the layers that lack an adapter at a position where other layers have one.

    Encoder layers need no adapter after a cross-attention module, because they have no such module.
    """
    kinds: dict[tuple[int, bool], set[str]] = {}
    for target, (_, rule) in rules.items():
        kinds.setdefault((_layer(target, base), _in_decoder(target)), set()).add(rule.flag)
    every = set[str]().union(*kinds.values())
    both = len({decoder for _, decoder in kinds}) > 1
    wanted = {False: every - {"cross_adapter"} if both else every, True: every}
    return {layer for (layer, decoder), flags in kinds.items() if flags != wanted[decoder]}


def _coupling(updates: Updates) -> dict[str, JsonValue]:
    """Return the config fields for an invertible adapter. If there is no such adapter, the fields' values are None."""
    invertible = [update for each in updates.values() for update in each if update.method == "invertible"]
    if not invertible:
        return {"inv_adapter": None, "inv_adapter_reduction_factor": None}
    inner, second = invertible[0].tensors["F_down"].shape
    return {"inv_adapter": "nice", "inv_adapter_reduction_factor": _factor(int(second), int(inner))}


def _why_no_coupling(target: Target, update: Update, model_type: str | None) -> str:
    (a, second), (b, first) = (update.tensors[name].shape for name in ("F_down", "G_down"))
    if update.attributes["reverse"] or not target.path.endswith(EMBEDDINGS.get(model_type or "", "?")):
        return "its target is not the base's embeddings, or the base is unknown; pass --base BASE (base=)"
    if int(first // _factor(int(second), int(a))) != b or first not in (second, second - 1):
        return "a config has one reduction factor for F and G, but no factor fits the shapes of both"
    return ""


def _form(update: Update) -> tuple[object, ...]:
    """Return the properties that must be equal in all adapters, because a config states them only once.

    Positions and bottleneck sizes may differ.
    """
    words = {name: value for name, value in update.attributes.items() if name not in ("residual", "norm")}
    dims = {name: size for name, size in update.dims().items() if name != "d"}
    return update.method, words, set(update.tensors), dims


def _unbiased(update: Update) -> tuple[str, ...]:
    """Return the bias fields that an update may lack: both if a `compacter` update has neither, otherwise none."""
    none = update.method == "compacter" and "down_bias" not in update.tensors and "up_bias" not in update.tensors
    return ("down_bias", "up_bias") if none else ()


def _bare_gate(update: Update) -> bool:
    return "gate" in update.tensors and "gate_bias" not in update.tensors


def _uneven(adapters: list[tuple[Target, Update]], base: Checkpoint | None) -> set[int]:
    """Return the indices of the layers in which not all adapters have the same bottleneck size."""
    sizes: dict[int, set[int]] = {}
    for target, update in adapters:
        sizes.setdefault(_layer(target, base), set()).add(_sizes(update)[1])
    return {layer for layer, layers in sizes.items() if len(layers) > 1}


def _sizes(update: Update) -> tuple[int, int]:
    """Return (hidden size of the block, bottleneck size)."""
    hidden, inner = (cast(int, update.dims()[name]) for name in ("hidden", "d"))
    return hidden, inner


def _factor(hidden: int, inner: int) -> float:
    """Return a reduction factor for which the adapters library's formula `int(hidden // factor)` yields `inner`."""
    factor = hidden / inner
    return factor if int(hidden // factor) == inner else math.nextafter(factor, 0)


def _layers(base: Checkpoint | None, *, encoder: bool = False) -> int:
    """Return the number of the model's layers; 0 if unknown. If `encoder` is true, count only the encoder's layers."""
    config = None if base is None else base.config
    layers = count_in(config, LAYERS) or 0
    if model_type_of(base) not in ENCODER_DECODER or encoder:
        return layers
    decoder = count_in(config, DECODER_LAYERS)
    return layers + (layers if decoder is None else decoder)


def _layer(target: Target, base: Checkpoint | None = None) -> int:
    """Return the index of a target's layer. In an encoder-decoder base, decoder layers come after encoder layers."""
    match = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", target.path)
    before = _layers(base, encoder=True) if model_type_of(base) in ENCODER_DECODER and _in_decoder(target) else 0
    return before + int(match[1]) if match else 0


def _in_decoder(target: Target) -> bool:
    return "decoder" in target.path.split(".")


KIND, INVERTIBLE, SHARED = "adapters", "invertible_adapters", "shared_parameters"

OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""A map from the names of activations in configs without a `version` to the current names."""

TWICE = {"adapter_norm_before.weight": "norm_before", "adapter_norm_before.bias": "norm_before_bias"}
"""A map from slots to fields, for the norm before the adapter. Files also store this norm as `adapter_down.0`."""


class BottleneckFields(FamilyFields, frozen=True, kw_only=True):
    """The config fields that determine the positions of the adapters, and the meaning of their tensors."""

    non_linearity: str
    mh_adapter: bool = False
    output_adapter: bool = False
    cross_adapter: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: Number | str = 1.0
    use_gating: bool = False
    inv_adapter: str | None = None
    phm_layer: bool = False
    phm_bias: bool | None = True
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    shared_W_phm: bool | None = False
    factorized_phm_W: bool | None = True


class BottleneckFamily(AdapterHubFamily):
    """The family of configs without an `architecture`."""

    methods = frozenset({"bottleneck", "compacter", "invertible"})
    fields = BottleneckFields
    read: ClassVar[Mapping[str, str]] = {
        "adapter_residual_before_ln": "whether the adapter's own residual is added before the adapter's last norm",
        "cross_adapter": "whether adapters follow the cross-attention",
        "factorized_phm_W": "Compacter: whether each factor is a product of two smaller factors",
        "factorized_phm_rule": "Compacter: whether each rule is a product of two smaller factors",
        "inv_adapter": "`nice`: a coupling block follows the embeddings; `glow`: not supported",
        "is_parallel": "whether the adapter reads the residual and adds its own output to the layer's output",
        "ln_after": "whether a norm follows the adapter",
        "ln_before": "whether a norm precedes the adapter",
        "mh_adapter": "whether adapters follow the attention",
        "non_linearity": "the activation",
        "original_ln_after": "whether the block's residual and norm follow the adapter",
        "original_ln_before": "whether the block's residual and norm come before the adapter",
        "output_adapter": "whether adapters follow the feed-forward layers",
        "phm_bias": "Compacter: whether the down and up layers have a bias",
        "phm_layer": "whether the method is Compacter",
        "residual_before_ln": (
            "the value that the adapter's own residual adds (`true`: the layer's output; `false`: the adapter's input; "
            "`post_add`: the layer's output, plus the block's residual if `original_ln_before`)"
        ),
        "scaling": "the factor that multiplies the change: a number, `learned` or `channel`",
        "shared_W_phm": "Compacter: whether the layers of all adapters share their factors",
        "shared_phm_rule": "Compacter: whether the layers of all adapters share one rule",
        "use_gating": "whether a gate multiplies the change",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "dropout": "training only",
        "hypercomplex_nonlinearity": "initial values",
        "init_weights": "initial values",
        "init_weights_seed": "initial values",
        "inv_adapter_reduction_factor": "a size, which the tensors already show",
        "learn_phm": "training only",
        "leave_out": "lists the layers without adapters, which the keys already show",
        "phm_c_init": "initial values",
        "phm_dim": "a size, which the tensors already show",
        "phm_init_range": "initial values",
        "phm_rank": "a size, which the tensors already show",
        "reduction_factor": "a size, which the tensors already show",
        "stochastic_depth": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = FRESH

    @classmethod
    def settle(cls, fields: BottleneckFields, settings: AdapterHubSettings) -> BottleneckFields:
        name = fields.non_linearity.lower()
        renamed = OLD_NAMES.get(name, name) if settings.version is None else name
        return msgspec.structs.replace(fields, non_linearity=renamed)

    @classmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        _check_words(part)
        words = msgspec.structs.asdict(part.method_fields)
        shared, keys = _shared(part, words)
        for path, slots in part.groups(KIND).items():
            rule_found = standing(path, part.settings.model_type) if part.settings.model_type in MODELS else None
            if rule_found is None:
                why = (
                    f"this version does not know which module the adapter at {path} changes in a "
                    f"{part.settings.model_type} model"
                )
                known = f"Known: {', '.join(sorted(MODELS))}"
                raise Unsupported(why, where=next(iter(slots.values())).text, cure=known)
            target, rule = rule_found
            if getattr(part.method_fields, rule.flag):
                tensors, own_keys = _adapter_tensors(part, words, slots)
                place = {"residual": rule.residual, "norm": rule.norm}
                method = "compacter" if part.method_fields.phm_layer else "bottleneck"
                update = make(method, tensors | shared, **_attributes(part.method_fields), **place)
                yield AdapterHubUpdate(Target(target), update, (*own_keys, *keys))
        if part.method_fields.inv_adapter:
            yield from _invertible(part)

    @classmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        for group in forms(updates):
            words = words_of([update for _, update in group])
            for target, update in group:
                hung = hanging(target.path, update.attributes["residual"], update.attributes["norm"], naming.model_type)
                path = target.path if hung is None else hung[0]
                for slot, field in {**separate_slots(words), **(TWICE if words["ln_before"] else {})}.items():
                    yield naming.key(path, KIND, slot), as_lazy(update.tensors[field])
            for slot, fields in shared_slots(words).items():
                yield naming.key(naming.root, SHARED, slot), as_lazy(group[0][1].tensors[fields[0]])
        for update in (u for group in updates.values() for u in group if u.method == "invertible"):
            for slot, field in COUPLING.items():
                yield naming.key(naming.root, INVERTIBLE, slot), as_lazy(update.tensors[field])

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        return compose(updates, base)

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        return losses(updates, base)


def _check_words(part: AdapterHubPart) -> None:
    fields = part.method_fields
    known = {
        "non_linearity": (fields.non_linearity, tuple(ACTIVATIONS)),
        "scaling": (fields.scaling if isinstance(fields.scaling, str) else "channel", ("learned", "channel")),
        "residual_before_ln": (str(fields.residual_before_ln).lower(), ("true", "false", "post_add")),
        "inv_adapter": (fields.inv_adapter or "nice", ("nice",)),
    }
    for field, (word, words) in known.items():
        if word not in words:
            why = f"{field} has an unknown value {word[:60]!r}"
            raise Unsupported(why, where=f"{part.at}.{field}", cure=f"Known: {', '.join(words)}")


def _adapter_tensors(
    part: AdapterHubPart, words: Mapping[str, object], slots: Mapping[str, AdapterHubKey]
) -> tuple[dict[str, Lazy], list[AdapterHubKey]]:
    """Return the tensors that only this adapter has, by field, and the keys of these tensors."""
    fields = separate_slots(words)
    tensors = take(part, slots, fields)
    keys = [slots[slot] for slot in fields]
    for slot, field in TWICE.items() if words["ln_before"] else ():
        if slot in slots:
            check_same(part, slots[slot], next(slots[s] for s, f in fields.items() if f == field))
            keys.append(slots[slot])
    return tensors, keys


def _shared(part: AdapterHubPart, words: Mapping[str, object]) -> tuple[dict[str, Lazy], list[AdapterHubKey]]:
    """Return the tensors that all adapters share, by field, and the keys of these tensors."""
    fields = shared_slots(words)
    groups = [*part.groups(SHARED).values()]
    missing = [slot for slot in fields if not groups or slot not in groups[0]]
    if missing:
        why = f"the file lacks the shared {', '.join(missing)}; a model without a head saves no shared tensors"
        raise Malformed(why, where=SHARED, cure="Save the adapter again, from the trained model with a head")
    keys = [groups[0][slot] for slot in fields]
    tensors = {field: part.tensors[key] for key, slot in zip(keys, fields, strict=True) for field in fields[slot]}
    return tensors, keys


def _attributes(fields: BottleneckFields) -> dict[str, JsonValue]:
    return {
        "non_linearity": fields.non_linearity,
        "scaling": 1.0 if isinstance(fields.scaling, str) else float(fields.scaling),
        "parallel": fields.is_parallel,
        "original_ln_before": fields.original_ln_before,
        "original_ln_after": fields.original_ln_after,
        "residual_before_ln": str(fields.residual_before_ln).lower(),
        "adapter_residual_before_ln": fields.adapter_residual_before_ln,
    }


def _invertible(part: AdapterHubPart) -> Iterator[AdapterHubUpdate]:
    """Yield the updates for the coupling block after the embeddings.

    The adapters library also runs the inverse of this block before the head. There is no update for the inverse,
    because no module of the base could be its target.
    """
    for path, slots in part.groups(INVERTIBLE).items():
        name = EMBEDDINGS.get(part.settings.model_type or "")
        if name is None:
            why = f"this version does not know the embedding module of a {part.settings.model_type} model"
            raise Unsupported(
                why, where=next(iter(slots.values())).text, cure=f"Known: {', '.join(sorted(EMBEDDINGS))}"
            )
        update = make("invertible", take(part, slots, COUPLING), non_linearity=part.method_fields.non_linearity)
        yield AdapterHubUpdate(
            Target(f"{path}.{name}" if path else name), update, tuple(slots[slot] for slot in COUPLING)
        )
