"""Read and write prefix tuning. All attention modules of a kind share one network, or one tensor of keys and values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ....core.adapter import Target, Updates
from ....errors import (
    PASS_BASE_WITH_CONFIG,
    USE_ITS_CONFIG,
    USE_ITS_CONFIG_AND_BASE,
    Malformed,
    ShapeMismatch,
    Unsupported,
    UsageError,
)
from ....io.inputs import decimal_number
from ....io.lazy import Lazy, as_lazy
from ..file import AGAIN, AdapterHubUpdate, KeptKey, check_same, joined, make, model_type_of, sliced, take
from . import AdapterHubFamily, FamilyFields, Size, count_in

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubKey, AdapterHubNaming, AdapterHubPart, Findings


ENCODER_DECODER = ("bart", "mbart", "mt5", "plbart", "t5", "whisper")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
ATTENTIONS = {
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta"), (".attention.self",)),
    **dict.fromkeys(("llama", "mistral"), (".self_attn",)),
    **dict.fromkeys(("mt5", "t5"), (".SelfAttention", ".EncDecAttention")),
    **dict.fromkeys(("bart", "mbart", "plbart"), (".self_attn", ".encoder_attn")),
    "gpt2": (".attn",),
}
"""The endings of attention modules' paths, by `model_type`. The writer supports prefixes only at these modules."""

DEPTHS = {
    "encoder_prefix": ("encoder_layers", "num_layers"),
    "self_prefix": ("decoder_layers", "num_decoder_layers", "num_layers"),
    "cross_prefix": ("decoder_layers", "num_decoder_layers", "num_layers"),
}
"""For each group of attention modules (see `group_of`), the config fields that state how many modules the group has.

These are fields of an encoder-decoder base's config. The first field that exists is used.
"""


def why_not(target: Target, update: Any, first: Any, model_type: str | None) -> str:
    """Return the reason why a new config cannot express an update; empty if the config can.

    The adapters library adds prefixes to all attention modules, except in the layers that `leave_out` lists.
    """
    endings = ATTENTIONS.get(model_type or "")
    if endings is None:
        return (
            "the adapters library adds prefixes to all attentions, and only the base shows which attentions exist; "
            "pass --base BASE (base=)"
        )
    if not target.path.endswith(endings):
        return f"the adapters library has no prefixes at this attention of a {model_type}"
    if "P" in update.tensors:
        return (
            ""
            if update.P.shape[0] == 1 and update.attributes.get("step", 1) == 1
            else "it has keys and values for several layers, but each attention must have its own update"
        )
    shared = all(update.tensors[name] is first.tensors[name] for name in ("E", "W1", "b1"))
    return "" if shared and update.b2.shape[0] == 1 else "it has its own network, but all attentions must share one"


def lacking(counts: Mapping[str, int], group: str, base: Checkpoint | None) -> str:
    """Return an error text if an adapter covers too few or too many attention modules of an encoder-decoder model.

    Otherwise, return "". Also return "" if there is no base, or if the base is not an encoder-decoder model.

    `counts` contains the number of updates in each group. Every attention module in `group` and in `self_prefix` must
    have an update, because the adapters library cannot omit a layer of an encoder-decoder model. The names of the
    base's tensors show how many attention modules there are. The base's config is only the fallback, because a config
    may omit the number of layers if this number is the default.
    """
    config = {} if base is None else base.config or {}
    model_type = config.get("model_type")
    if base is None or model_type not in ENCODER_DECODER:
        return ""
    depths = _depths(base, str(model_type))
    for name in sorted({group, "self_prefix"}):
        depth = depths.get(name) or next((config[w] for w in DEPTHS[name] if isinstance(config.get(w), int)), 0)
        if counts.get(name, 0) != depth:
            some = f"the adapter covers {counts.get(name, 0)} of {depth} attention modules in {name}"
            return f"{some}; the adapters library adds prefixes to all of them"
    return ""


def _depths(base: Checkpoint, model_type: str) -> dict[str, int]:
    """Count the base's attention modules in each group (see `group_of`)."""
    paths_of: dict[str, set[str]] = {}
    for name in base.tensors:
        for ending in ATTENTIONS.get(model_type, ()):
            path, inside, _ = name.rpartition(f"{ending}.")
            if inside:
                paths_of.setdefault(group_of(path + ending, model_type), set()).add(path)
    return {group: len(paths) for group, paths in paths_of.items()}


def unlike(update: Any, first: Any) -> str:
    """Return the reason why one config cannot describe both updates; empty if their methods and shapes are equal."""
    shapes, others = ({n: tuple(leaf.shape) for n, leaf in u.tensors.items()} for u in (update, first))
    same = shapes == others and update.method == first.method
    return "" if same else "its method or shapes differ from the first update, but one config applies to all updates"


def group_of(path: str, model_type: str | None) -> str:
    """Return the group of an attention module: `encoder_prefix`, `cross_prefix` or `self_prefix`."""
    if path.endswith(("EncDecAttention", ".encoder_attn")) or ".crossattention" in path:
        return "cross_prefix"
    inside = "encoder" in path.split(".") and model_type in ENCODER_DECODER
    return "encoder_prefix" if inside else "self_prefix"


def layer_of(path: str) -> int:
    """Return the first number in a path; -1 if there is none."""
    match = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", path)
    return int(match[1]) if match else -1


# All attention modules of a kind (`encoder_prefix`, `cross_prefix` or `self_prefix`) share one network, or one flat
# tensor. The adapters library also stores the shared tensors under every attention module, so a file has many copies.
# In adapterkit, each attention module is a target. The target's update prepends only this module's share of the keys
# and values. The prefix does not shift `position_ids`, and its keys get no rotary position encoding.


KIND, LAYER, POOL = "prefix_tunings", "prefix_tuning", ".prefix_tuning.pool"
GATES = "prefix_gates"
GATE = {"weight": "gate", "bias": "gate_bias"}
GROUPS = ("encoder_prefix", "self_prefix", "cross_prefix")
FLAT = "control_trans"
METHODS = {
    (True, False): "prefix",
    (False, False): "prefix_mlp",
    (True, True): "gated_prefix",
    (False, True): "gated_prefix_mlp",
}
"""The name of the method, by (flat, use_gating)."""
NETWORK = {
    "wte.weight": "E",
    "control_trans.0.weight": "W1",
    "control_trans.0.bias": "b1",
    "control_trans.2.weight": "W2",
    "control_trans.2.bias": "b2",
}
"""A map from a group's slots to fields. In a file, the tensors for `W2` and `b2` contain the rows of all layers."""

HEADS = ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
"""Config fields that state a base's number of heads for keys and values. The first field that exists is used.

If the base has an encoder and a decoder, the field's value is the number of heads in the encoder.
"""


class PrefixFields(FamilyFields, frozen=True, kw_only=True):
    """The config fields that determine the meaning of the tensors."""

    flat: bool = False
    prefix_length: Size = 30
    non_linearity: str = "tanh"
    leave_out: tuple[int, ...] = ()
    use_gating: bool = False
    shared_gating: bool = True


class PrefixTuningFamily(AdapterHubFamily):
    """The family `prefix_tuning`."""

    methods = frozenset(METHODS.values())
    fields = PrefixFields
    read: ClassVar[Mapping[str, str]] = {
        "flat": "whether the file has keys and values instead of a network that computes them",
        "leave_out": "layers without prefixes; tensors of these layers in the file are unused copies",
        "non_linearity": "the network's activation: tanh",
        "prefix_length": "the number of virtual tokens",
        "shared_gating": "whether keys and values share one gate",
        "use_gating": "whether each attention computes gates from its input to scale the prefix's keys and values",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "bottleneck_size": "a size, which the tensors already show",
        "cross_prefix": "selects attentions with prefixes, which the keys already show",
        "dropout": "training only",
        "encoder_prefix": "selects attentions with prefixes, which the keys already show",
        "init_weights_seed": "initial values",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "architecture": "prefix_tuning",
        "dropout": 0.0,
        "init_weights_seed": None,
        "non_linearity": "tanh",
    }

    @classmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        _check(part)
        groups = part.groups(KIND)
        pools = {path.removesuffix(POOL): slots for path, slots in groups.items() if path.endswith(POOL)}
        whole = next((slots for path, slots in groups.items() if not path.endswith(POOL)), None)
        if whole is None or not pools:
            return
        names = list(dict.fromkeys(slot.partition(".")[0] for slot in whole))
        for name in names:
            if name not in GROUPS:
                why = f"this version does not know the kind of attention {name[:60]!r}"
                raise Unsupported(why, where=next(iter(whole.values())).text, cure=f"Known: {', '.join(GROUPS)}")
            members = [path for path in sorted(pools, key=_in_order) if _group(path, part) == name]
            yield from _group_updates(part, name, members, whole)
        used = {
            path
            for name in names
            for path in pools
            if _group(path, part) == name and layer_of(path) not in part.method_fields.leave_out
        }
        for path, slots in pools.items():
            for slot, key in slots.items():
                if slot not in whole:
                    raise Malformed(
                        "this tensor is a layer's copy of a shared tensor, but the file lacks the shared tensor",
                        where=key.text,
                        cure=AGAIN,
                    )
                check_same(part, key, whole[slot])
                if path not in used:
                    yield KeptKey(key)

    @classmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        groups: dict[str, list[tuple[Target, Any]]] = {}
        for target, group_updates in updates.items():
            group = group_of(target.path, naming.model_type)
            groups.setdefault(group, []).extend((target, update) for update in group_updates)
        for name, members in groups.items():
            members.sort(key=lambda pair: _in_order(pair[0].path))
            for slot, leaf in _slots([update for _, update in members]).items():
                for path in (naming.at_root(LAYER), *(target.path + POOL for target in updates)):
                    yield naming.key(path, KIND, f"{name}.{slot}" if slot else name), leaf
        for target, group_updates in updates.items():
            for slot, field in GATE.items():
                for update in (update for update in group_updates if field in update.tensors):
                    yield naming.key(f"{target.path}.{LAYER}", GATES, slot), as_lazy(update.tensors[field])

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        some: Any = next(iter(updates.values()))[0]
        flat = "P" in some.tensors
        # An attention module has no gates, one gate (for keys and values together), or two gates.
        gates = int(some.tensors["gate"].shape[0]) if "gate" in some.tensors else 0
        config, model_type = None if base is None else base.config, model_type_of(base)
        pair, groups = model_type in ENCODER_DECODER, {group_of(target.path, model_type) for target in updates}
        layers = 0 if pair else count_in(config, LAYERS) or 0
        return {
            "cross_prefix": not pair or "cross_prefix" in groups,
            "encoder_prefix": not pair or "encoder_prefix" in groups,
            "bottleneck_size": 512 if flat else int(some.W1.shape[0]),
            "flat": flat,
            "leave_out": sorted({*range(layers)} - {layer_of(target.path) for target in updates}),
            "prefix_length": int(some.P.shape[3] if flat else some.E.shape[0]),
            "shared_gating": gates < 2,
            "use_gating": gates > 0,
        }

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        model_type = model_type_of(base)
        first: dict[str, Any] = {}
        counts = Counter(group_of(target.path, model_type) for target in updates)
        for target, group_updates in updates.items():
            group = group_of(target.path, model_type)
            for position, update in enumerate(group_updates):
                some = first.setdefault(group, update)
                why = lacking(counts, group, base) or why_not(target, update, some, model_type)
                why = (
                    why
                    or unlike(update, next(iter(first.values())))
                    or ("the attention has a second update" if position else "")
                )
                if why:
                    yield target, position, f"{update.method}: {why}"


def _check(part: AdapterHubPart) -> None:
    if part.method_fields.non_linearity.lower() != "tanh" and not part.method_fields.flat:
        why = f"this version does not support a network with the activation {part.method_fields.non_linearity[:60]!r}"
        raise Unsupported(why, where=f"{part.at}.non_linearity", cure="Known: tanh")
    if part.method_fields.leave_out and part.settings.model_type in ENCODER_DECODER:
        why = "this version does not support omitted layers in a model with an encoder and a decoder"
        raise Unsupported(why, where=f"{part.at}.leave_out", cure="Known: []")


def _group_updates(
    part: AdapterHubPart, name: str, paths: Sequence[str], whole: Mapping[str, AdapterHubKey]
) -> Iterator[AdapterHubUpdate]:
    """Yield the updates for the attention modules of one kind, except in omitted layers."""
    prefix = name if part.method_fields.flat else f"{name}."
    keys_of_slots = {
        slot.removeprefix(prefix).lstrip("."): key for slot, key in whole.items() if slot.startswith(prefix)
    }
    tensors = take(part, keys_of_slots, {FLAT: "P"} if part.method_fields.flat else NETWORK)
    keys = tuple(keys_of_slots.values())
    placed = [path for path in paths if layer_of(path) not in part.method_fields.leave_out]
    heads, width = _sizes(part, tensors, len(placed), keys[0])
    own_heads = (part.base.config or {}).get("decoder_attention_heads", heads) if part.base is not None else heads
    if name != "encoder_prefix" and own_heads != heads:
        why = (
            f"the keys and values have {heads} heads, but the decoder has {own_heads}; "
            "the adapters library cannot run such an adapter"
        )
        raise ShapeMismatch(
            why, where=keys[0].text, cure="Pass the base that the adapter was trained on with --base (base=)"
        )
    if "W2" in tensors and (len(tensors["W2"].shape) != 2 or tensors["W2"].shape[:1] != tensors["b2"].shape):
        why = f"the weight {list(tensors['W2'].shape)} does not fit the bias {list(tensors['b2'].shape)}"
        raise ShapeMismatch(why, where=keys[0].text, cure=AGAIN)
    method = METHODS[part.method_fields.flat, part.method_fields.use_gating]
    for position, path in enumerate(placed):
        mine = tuple(key for key in part.tensors if key.kind == KIND and key.path == path + POOL)
        gate = _gate(part, path, keys[0])
        own_gate = {GATE[slot]: part.tensors[key] for slot, key in gate.items()}
        if part.method_fields.flat:
            P = _share(tensors["P"], part.method_fields.prefix_length, len(placed), position, heads)
            update = make(method, {"P": P, **own_gate})
        else:
            start, stop = position * 2 * width, (position + 1) * 2 * width
            W2, b2 = sliced(tensors["W2"], start, stop), sliced(tensors["b2"], start, stop)
            shape = (1, 2, heads, width // heads)
            share = {"W2": W2.reshape(*shape, W2.shape[1]), "b2": b2.reshape(*shape)}
            update = make(method, {**tensors, **share, **own_gate})
        yield AdapterHubUpdate(Target(path), update, (*keys, *mine, *gate.values()))


def _gate(part: AdapterHubPart, path: str, where: AdapterHubKey) -> dict[str, AdapterHubKey]:
    """Return the keys of an attention module's gate, by slot; empty if the config has no gate.

    Raises:
        Malformed: the file lacks the gate.
        ShapeMismatch: the number of gates contradicts the config.
    """
    if not part.method_fields.use_gating:
        return {}
    slots = part.groups(GATES).get(f"{path}.{LAYER}", {})
    if slots.keys() != GATE.keys():
        raise Malformed(f"the file lacks the gate of {path}", where=where.text, cure=AGAIN)
    shape = part.tensors[slots["weight"]].shape
    if shape[:1] != ((1,) if part.method_fields.shared_gating else (2,)):
        gates_text = "one gate" if part.method_fields.shared_gating else "two gates"
        why = f"the shape is {list(shape)}, but the config states {gates_text} for keys and values"
        cure = USE_ITS_CONFIG
        raise ShapeMismatch(why, where=slots["weight"].text, cure=cure)
    return slots


def _sizes(part: AdapterHubPart, tensors: Mapping[str, Lazy], layers: int, key: AdapterHubKey) -> tuple[int, int]:
    """Return the number of heads, and the total width of all heads in one layer's keys.

    Raises:
        UsageError: neither `part.heads` nor the base's config gives the number of heads.
        ShapeMismatch: the tensors' shapes do not fit the number of layers or the number of heads.
    """
    last = tensors["P"] if part.method_fields.flat else tensors["b2"]
    total = last.shape[0] if len(last.shape) == 1 else 0
    rows = 2 * layers * (part.method_fields.prefix_length if part.method_fields.flat else 1)
    heads = part.heads or count_in(None if part.base is None else part.base.config, HEADS) or 0
    if heads < 1:
        why = "the file does not state the number of heads of keys and values"
        raise UsageError(why, where=key.text, cure=PASS_BASE_WITH_CONFIG)
    if not rows or total % (rows * heads) or not total:
        why = f"the shape {list(last.shape)} does not fit keys and values for {layers} layers with {heads} heads"
        raise ShapeMismatch(
            why,
            where=key.text,
            cure=USE_ITS_CONFIG_AND_BASE,
        )
    return heads, total // rows


def _share(flat: Lazy, length: int, layers: int, layer: int, heads: int) -> Lazy:
    """Return the keys and values of one layer, with the shape `[1, 2, heads, length, d]`.

    `flat` contains the keys and values of all layers: a flattened tensor with axes `[length, layers, 2, heads, d]`.
    """
    d = flat.shape[0] // (length * layers * 2 * heads)
    shape = (1, 2, heads, length, d)
    return flat.map(lambda v: v.reshape(length, layers, 2, heads, d)[:, layer].transpose(1, 2, 0, 3)[None], shape)


def _slots(updates: Sequence[Any]) -> dict[str, Lazy]:
    if "P" in updates[0].tensors:
        whole = joined([as_lazy(update.P) for update in updates])
        size = whole.nbytes // whole.dtype.itemsize
        return {FLAT: whole.map(lambda v: v.transpose(3, 0, 1, 2, 4).reshape(-1), (size,))}
    slots = {slot: as_lazy(updates[0].tensors[field]) for slot, field in NETWORK.items() if field in ("E", "W1", "b1")}
    rows = sum(as_lazy(update.b2).nbytes // as_lazy(update.b2).dtype.itemsize for update in updates)
    W2 = joined([as_lazy(update.W2) for update in updates])
    b2 = joined([as_lazy(update.b2) for update in updates])
    return slots | {"control_trans.2.weight": W2.reshape(rows, W2.shape[-1]), "control_trans.2.bias": b2.reshape(rows)}


def _group(path: str, part: AdapterHubPart) -> str:
    return group_of(path, part.settings.model_type)


def _in_order(path: str) -> list[tuple[int, str]]:
    """Return a key for sorting paths, so that layer 10 comes after layer 9."""
    numbers = [(decimal_number(part), part) for part in path.split(".")]
    return [(-1, part) if number is None else (number, "") for number, part in numbers]
