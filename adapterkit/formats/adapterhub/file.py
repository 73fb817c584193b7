"""Parse the settings and keys of AdapterHub files, compose keys and LoRA configs, and list the layers to adapt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec

from ...errors import Malformed
from ...io.lazy import Lazy
from ...methods import METHODS
from ...naming.binding.fitting import biasless
from ...naming.moves import stored_in_out
from .._format import FORMULA
from ..peft.patterns import exact_alpha

if TYPE_CHECKING:
    from ...core.adapter import Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Leaf
    from ...io.strict_json import JsonValue

# Define the top-level fields of a config. The field `version` names the release that wrote the config.


LIBRARY = "adapters."
"""The prefix of `version` in configs of the `adapters` library. Configs of adapter-transformers lack this prefix."""

RELEASE = "adapters.1.3.0"
"""The `version` in new configs."""

UNSCALED_UNTIL = ((1, 1, 0), True)
"""Before this release, the adapters library trained LoRA without a scaling."""

Release = tuple[tuple[int, ...], bool]
"""A release as (version numbers, is final). `1.1.0.dev0` sorts before `1.1.0`, because False sorts before True."""


class AdapterHubSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The top-level fields of a config.

    Attributes:
        name: the adapter's name, which is a part of every key.
        model_type: the base's `model_type` in transformers.
        model_name: the base's name, such as a repository on the hub.
        version: the library that wrote the file and the library's release, such as `adapters.1.3.0`.
        interface: the contents of `adapter_interface.json`, or None.
    """

    name: str
    model_type: str | None = None
    model_name: str | None = None
    version: str | None = None
    interface: dict[str, Any] | None = None

    @property
    def unscaled(self) -> bool:
        """Whether a release of `adapters` before 1.1 wrote the file.

        These releases trained LoRA without the scaling `alpha / r`.
        """
        release = _release(self.version)
        return release is not None and release < UNSCALED_UNTIL


def _release(version: str | None) -> Release | None:
    """Parse a `version` such as `adapters.1.3.0`. Return None for any other value, such as `3.2.1`."""
    match = re.match(r"adapters\.(\d{1,6}(?:\.\d{1,6}){0,3})(.{0,40})$", version or "")
    if match is None:
        return None
    numbers = tuple(int(number) for number in match[1].split("."))
    return (*numbers, 0, 0, 0)[:3], not re.search(r"dev|a|b|rc", match[2])


# Parse a file's keys, and compose keys for a writer.


KINDS = {
    "adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "attention_text_task_adapters": "adapters",
    "invertible_adapters": "invertible_adapters",
    "invertible_lang_adapters": "invertible_adapters",
    "layer_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "loras": "loras",
    "prefix_gates": "prefix_gates",
    "prefix_tunings": "prefix_tunings",
    "prompt_tunings": "prompt_tunings",
    "refts": "refts",
    "shared_parameters": "shared_parameters",
}
"""A map from the kind of adapter in a key, such as `loras`, to the kind's current name.

Old names, such as `layer_text_task_adapters`, are only in files from adapter-transformers before version 2.
"""

_KEY = re.compile(
    rf"(?:(?P<path>.+)\.)?(?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})\.(?P<name>[^.]+)\.(?P<slot>.+)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class AdapterHubKey:
    """One key of a tensor file.

    Attributes:
        text: the complete key.
        path: the module's path; empty for the model itself.
        kind: one of the values of `KINDS`.
        slot: the part of the key after the adapter's name.
    """

    text: str
    path: str
    kind: str
    slot: str


def parse_keys(tensors: Mapping[str, Lazy], name: str) -> dict[AdapterHubKey, Lazy]:
    """Parse all keys of a file, in the file's order.

    Raises:
        Malformed: a key does not belong to the adapter `name`.
    """
    return {parse_key(text, name): tensor for text, tensor in tensors.items()}


def parse_key(text: str, name: str) -> AdapterHubKey:
    """Parse one key.

    Raises:
        Malformed: the key does not belong to the adapter `name`.
    """
    match = _KEY.fullmatch(text)
    if match is None:
        why, cure = f"the key does not belong to the adapter {name!r}", "Remove the tensor, or save the adapter again"
        raise Malformed(why, where=text, cure=cure)
    if match["name"] != name:
        why = f"the key belongs to the adapter {match['name']!r}, but the config belongs to {name!r}"
        raise Malformed(why, where=text, cure="Save each adapter in its own folder")
    return AdapterHubKey(text, match["path"] or "", KINDS[match["kind"]], match["slot"])


# A key consists of a module's path, the kind, the adapter's name and the slot. If the saved model has a head, the path
# begins with the base's name inside the saved model, such as `bert`.


INNER = ("blocks", "decoder", "embeddings", "encoder", "h", "layer", "layers", "transformer.layer")
"""Beginnings of module paths in a saved model without a head."""


@dataclass(frozen=True, slots=True)
class AdapterHubNaming:
    """The names that a writer needs to compose the keys of one file.

    Attributes:
        name: the adapter's name.
        model_type: the model type of the base, or None.
        root: the path of the base inside the saved model; empty if the saved model is the base.
    """

    name: str
    model_type: str | None = None
    root: str = ""

    def key(self, path: str, kind: str, slot: str) -> str:
        """Return the key `path.kind.name.slot`, without its empty parts."""
        return ".".join(part for part in (path, kind, self.name, slot) if part)

    def at_root(self, name: str = "") -> str:
        """Return the path `root.name`, without its empty parts.

        The keys of tensors that belong to the whole model, such as prompts, start with such a path.
        """
        return ".".join(part for part in (self.root, name) if part)


def root_of(paths: Iterable[str]) -> str:
    """Return the base's name inside the saved model, such as `bert`: the first component of all paths.

    Return an empty string if the first components differ, or if the saved model has no head.
    """
    first = set[str]()
    for path in filter(None, paths):
        if any(f"{path}.".startswith(f"{each}.") for each in INNER):
            return ""
        first.add(path.partition(".")[0])
    return first.pop() if len(first) == 1 else ""


# Define the input and the results of a family's `decode`: the part of a file that one config describes, and the updates
# in this part.


@dataclass(frozen=True, slots=True, eq=False)
class AdapterHubPart:
    """The part of a file that one config describes: the whole file, or one member of a union.

    Attributes:
        settings: the top-level fields of the config file.
        method_fields: the fields of this config.
        tensors: the tensors by parsed key, in the file's order.
        base: the base, or None.
        compat: the caller's `compat`; see `Format`.
        at: the location of this config in the config file, for messages. It is `config`. In a union, it is the path of
            the member, such as `config.configs[1]`.
        heads: the number of heads in a prefix's keys and values; None to read this number from the base's config.
    """

    settings: AdapterHubSettings
    method_fields: Any
    tensors: Mapping[AdapterHubKey, Lazy]
    base: Checkpoint | None = None
    compat: str | None = None
    at: str = "config"
    heads: int | None = None

    @property
    def by_formula(self) -> bool:
        """Whether to apply the paper's formula, even if the adapters library's forward computes another formula."""
        return self.compat == FORMULA

    def groups(self, kind: str) -> dict[str, dict[str, AdapterHubKey]]:
        """Return the keys of one kind, by module path and then by slot.

        Raises:
            Malformed: two keys name the same tensor, because their kinds have the same current name (see `KINDS`).
        """
        groups: dict[str, dict[str, AdapterHubKey]] = {}
        for key in self.tensors:
            if key.kind != kind:
                continue
            slots = groups.setdefault(key.path, {})
            if key.slot in slots:
                why = f"this key names the same tensor as {slots[key.slot].text}"
                raise Malformed(
                    why, where=key.text, cure="Save the adapter again with one version of the adapters library"
                )
            slots[key.slot] = key
        return groups

    def layout(self, path: str) -> str:
        """Return the layout in which models of this `model_type` store the weight of the linear layer at `path`."""
        turned = stored_in_out(f".{path}", {"model_type": self.settings.model_type})
        return "in out *k" if turned else "out *in"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterHubUpdate:
    """One update in a file, and the keys of its tensors."""

    target: Target
    update: Update
    keys: tuple[AdapterHubKey, ...]


@dataclass(frozen=True, slots=True, eq=False)
class KeptKey:
    """A key whose tensor has no effect. The adapter stores this tensor, so that the writer can write it again."""

    key: AdapterHubKey


Findings = Iterator[AdapterHubUpdate | KeptKey]


def joined(leaves: list[Lazy]) -> Lazy:
    """Concatenate tensors of one dtype along the first axis."""
    first = leaves[0]
    if len(leaves) == 1:
        return first
    shape = (sum(leaf.shape[0] for leaf in leaves), *first.shape[1:])
    return Lazy(shape, first.dtype, lambda: b"".join(bytes(leaf.fetch()) for leaf in leaves))


def sliced(leaf: Lazy, start: int, stop: int) -> Lazy:
    """Return the slice `start:stop` of a tensor's first axis. If this is the whole axis, return the tensor itself."""
    if (start, stop) == (0, leaf.shape[0]):
        return leaf
    return leaf.map(lambda values: values[start:stop], (stop - start, *leaf.shape[1:]))


def make(method: str, leaves: Mapping[str, Leaf], **attributes: object) -> Update:
    """Create an update of the method `method` with the given attributes.

    `leaves` maps fields to tensors, which may be lazy.
    """
    return METHODS[method](**leaves, **attributes)


def take(part: AdapterHubPart, slots: Mapping[str, AdapterHubKey], fields: Mapping[str, str]) -> dict[str, Lazy]:
    """Return a map from fields to tensors. `fields` maps slots to fields, and `slots` maps slots to keys.

    Raises:
        Malformed: the file lacks the tensor of a slot in `fields`.
    """
    missing = next((slot for slot in fields if slot not in slots), None)
    if missing is not None:
        where = next(iter(slots.values())).text
        raise Malformed(f"the file lacks a tensor that this one needs: {missing}", where=where, cure=AGAIN)
    return {field: part.tensors[slots[slot]] for slot, field in fields.items()}


def check_same(part: AdapterHubPart, one: AdapterHubKey, other: AdapterHubKey) -> None:
    """Check that the tensors of two keys are equal. The adapters library saves one tensor under both keys.

    Raises:
        Malformed: the values differ.
    """
    a, b = part.tensors[one], part.tensors[other]
    if a.span is not None and a.span == b.span:
        return
    if a.shape != b.shape or bytes(a.fetch()) != bytes(b.fetch()):
        why = f"the values differ from {other.text}; the adapters library saves the same tensor under both keys"
        raise Malformed(why, where=one.text, cure=AGAIN)


AGAIN = "Save the adapter again with the adapters library"

# List the linear layers that the adapters library can adapt, and write configs that select kinds of these layers.


Roles = Mapping[str, tuple[str, ...]]

BERT: Roles = {
    "q": (".self.query",),
    "k": (".self.key",),
    "v": (".self.value",),
    "intermediate": (".intermediate.dense",),
    "output": (".output.dense",),
}
VIT: Roles = {**BERT, "q": (".attention.query",), "k": (".attention.key",), "v": (".attention.value",)}
LLAMA: Roles = {
    "q": (".self_attn.q_proj",),
    "k": (".self_attn.k_proj",),
    "v": (".self_attn.v_proj",),
    "intermediate": (".mlp.down_proj",),
    "output": (".mlp.up_proj",),
}
PLUGIN: Roles = {**LLAMA, "intermediate": (".mlp.up_proj",), "output": (".mlp.down_proj",)}
BART: Roles = {
    "q": ("_attn.q_proj",),
    "k": ("_attn.k_proj",),
    "v": ("_attn.v_proj",),
    "intermediate": (".fc1",),
    "output": (".fc2",),
}
T5: Roles = {
    "q": ("Attention.q",),
    "k": ("Attention.k",),
    "v": ("Attention.v",),
    "intermediate": (".DenseReluDense.wi", ".DenseReluDense.wi_1"),
    "output": (".DenseReluDense.wo",),
}
GPT2: Roles = {"qkv": (".attn.c_attn",), "intermediate": (".mlp.c_fc",), "output": (".mlp.c_proj",)}
GPTJ: Roles = {
    "q": (".attn.q_proj",),
    "k": (".attn.k_proj",),
    "v": (".attn.v_proj",),
    "intermediate": (".mlp.fc_in",),
    "output": (".mlp.fc_out",),
}
DISTILBERT: Roles = {
    "q": (".attention.q_lin",),
    "k": (".attention.k_lin",),
    "v": (".attention.v_lin",),
    "intermediate": (".ffn.lin1",),
    "output": (".ffn.lin2",),
}

ROLES: Mapping[str, Roles] = {
    **dict.fromkeys(("bert", "bert-generation", "electra", "roberta", "xlm-roberta", "xmod"), BERT),
    **dict.fromkeys(("beit", "vit"), VIT),
    **dict.fromkeys(("llama", "mistral"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text", "qwen2", "qwen3"), PLUGIN),
    **dict.fromkeys(("bart", "mbart", "plbart", "whisper", "clip"), BART),
    **dict.fromkeys(("mt5", "t5"), T5),
    "distilbert": DISTILBERT,
    "gpt2": GPT2,
    "gptj": GPTJ,
}

FUSED = {"deberta": "in_proj", "eat": "qkv", "gpt2": "c_attn", "modernbert": "Wqkv"}
"""The name of the linear layer that computes queries, keys and values together, by model_type."""


def model_type_of(base: Checkpoint | None) -> str | None:
    """Return the `model_type` in a base's config; None without a base, or if the config has none."""
    model_type = (base.config or {}).get("model_type") if base is not None else None
    return model_type if isinstance(model_type, str) else None


def role(path: str, model_type: str) -> str | None:
    """Return the role of the linear layer at a path, such as `q` or `intermediate`. Configs select layers by role.

    The role of a fused weight is `qkv`. Return None if the layer is not in `ROLES`.
    """
    roles = ROLES.get(model_type, {})
    return next((word for word, endings in roles.items() if f".{path}".endswith(endings)), None)


def family_of_base(paths: Iterable[str], model_type: str | None) -> str | None:
    """Return `model_type` if `ROLES` lists the layers of this type of model, otherwise None.

    If `model_type` is None, return a model type in which all paths have a role (see `role`). Return None if no model
    type fits, or if the paths have different roles in two model types that fit.
    """
    paths = list(paths)
    if model_type is not None:
        return model_type if model_type in ROLES else None
    fits = {name: tuple(role(path, name) for path in paths) for name in ROLES}
    whole = {name: roles for name, roles in fits.items() if None not in roles}
    return next(iter(whole)) if len(set(whole.values())) == 1 else None


# For LoRA and similar methods, a new config has one rank and one scaling for all layers. It selects kinds of layers
# (with fields such as `selfattn_lora`), not single layers. The adapters library adapts all layers of these kinds. If a
# layer has no tensors in the file, it gets a new adapter, which has no effect.


QKV = ("q", "k", "v")


def compose(updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
    """Return the config fields for these updates."""
    some: Any = next(iter(updates.values()))[0]
    words = _words(updates, base)
    # IA3 has neither a rank nor a scaling. So its rank and alpha are 1.
    rank = 1 if some.method == "ia3" else int(some.A.shape[0])
    # `losses` must have checked that an exact alpha exists.
    alpha = exact_alpha((rank, float(some.attributes.get("scaling", 1.0))), rslora=False) or 0
    vera = some.method == "vera_matrices"
    return {
        "alpha": alpha,
        "attn_matrices": [word for word in QKV if word in words],
        "composition_mode": "scale" if some.method == "ia3" else "add",
        "init_weights": {"ia3": "ia3", "vera_matrices": "vera"}.get(some.method, "lora"),
        "intermediate_lora": "intermediate" in words,
        "output_lora": "output" in words,
        "r": rank,
        "selfattn_lora": not words.isdisjoint(QKV),
        "use_dora": some.method in ("dora", "dora_outputs"),
        "use_gating": some.method == "gated_lora",
        "vera_b": 0.0 if vera else None,
        "vera_d": 0.1 if vera else None,
    }


def losses(updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
    """Yield (target, index of the update, reason) for each update that a new config cannot express."""
    first = _formula_key(next(iter(updates.values()))[0])
    for target, group in updates.items():
        for position, update in enumerate(group):
            why = _why_not(target, update, base) or ("" if position == 0 else "the module has a second update")
            if not why and _formula_key(update) != first:
                why = "its method, rank or scaling differs from the first update, but one config applies to all updates"
            if why:
                yield target, position, why
    yield from _unplaced(updates, base)


def _formula_key(update: Any) -> tuple[object, ...]:
    if update.method == "ia3":
        return (update.method,)
    shared = (id(update.A), id(update.B)) if update.method == "vera_matrices" else ()
    return update.method, int(update.A.shape[0]), update.attributes.get("scaling"), shared


def _why_not(target: Target, update: Any, base: Checkpoint | None) -> str:
    if target.stacked:
        return f"the adapters library has no {update.method} on stacked experts"
    if update.method == "ia3":
        return "" if update.l is not None else "the adapters library's ia3 scales only outputs"
    if len(update.A.shape) != 2:
        return f"the adapters library has no {update.method} on a convolution"
    if 0 in update.A.shape:
        return f"its {update.method} has rank 0"
    if update.method == "lora" and update.bias is not None:
        return "the adapters library has no lora with a bias"
    scaling = float(update.attributes.get("scaling", 1.0))
    if exact_alpha((int(update.A.shape[0]), scaling), rslora=False) is None:
        return "no alpha yields its exact scaling"
    if update.method == "dora_outputs":
        return "the adapters library has no dora on a weight stored as [in, out]" if target.layout != "out *in" else ""
    return _why_not_dora(target, update, base) if update.method == "dora" else ""


def _why_not_dora(target: Target, update: Any, base: Checkpoint | None) -> str:
    """Return the reason why the adapters library cannot express a `dora` update; empty if it can.

    The adapters library has only `dora_outputs`, which computes the same as `dora` if the scaling is 1 and the layer
    has no bias.
    """
    if target.layout != "out *in":
        return "the adapters library has no dora on a weight stored as [in, out]"
    if update.scaling != 1:
        return "the scaling of this dora is not 1, but the adapters library computes the norm with a scaling of 1"
    if base is None:
        why = "the adapters library's dora also scales a bias, and only the base shows whether the layer has one"
        return f"{why}; pass --base BASE (base=)"
    return "" if biasless(base, target.path) else "the layer has a bias, which the adapters library's dora would scale"


def on_outputs(updates: Updates, base: Checkpoint | None) -> Updates:
    """Replace each `dora` with a `dora_outputs` that computes the same function, if possible."""
    return {target: tuple(_on_outputs(target, update, base) for update in group) for target, group in updates.items()}


def _on_outputs(target: Target, update: Any, base: Checkpoint | None) -> Any:
    if update.method != "dora" or len(update.A.shape) != 2 or _why_not_dora(target, update, base):
        return update
    return make("dora_outputs", update.tensors, scaling=update.scaling)


def _words(updates: Updates, base: Checkpoint | None) -> set[str]:
    """Return the roles of all adapted layers (see `role`). A third of a fused weight has the role `q`, `k` or `v`."""
    model_type = base_family(updates, base) or ""
    words: set[str] = set()
    for target in updates:
        word = role(target.path, model_type) or ""
        size = target.rows[1] - target.rows[0] if target.rows else 0
        words.add(QKV[target.rows[0] // size] if word == "qkv" and target.rows else word)
    return words


def base_family(updates: Updates, base: Checkpoint | None) -> str | None:
    """Return the `model_type` to pass to `role` for these targets; None if `ROLES` lacks the model type.

    If the base is None or its config has no `model_type`, infer it from the targets' paths (see `family_of_base`).
    """
    return family_of_base((target.path for target in updates), model_type_of(base))


def _unplaced(updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
    """Yield (target, index of the update, reason) for each update whose target a config cannot select."""
    family = base_family(updates, base)
    for target, group in updates.items():
        word = role(target.path, family or "")
        if family is None:
            why = "the model type is unknown; pass --base BASE (base=)"
        elif word is None:
            why = f"the adapters library does not adapt this layer of a {family} model"
        elif (word == "qkv") != (target.rows is not None):
            why = (
                "it adapts all of a fused weight, but the adapters library adapts queries, keys and values separately"
                if target.rows is None
                else "it adapts only some rows of a weight that is not fused"
            )
        elif target.rows is not None and not _third(target.rows):
            why = "its rows are not the queries, the keys or the values of a fused weight"
        else:
            continue
        yield from ((target, position, f"{group[position].method}: {why}") for position in range(len(group)))


def _third(rows: tuple[int, int]) -> bool:
    start, size = rows[0], rows[1] - rows[0]
    return start % size == 0 and start // size < 3


# The rules below state, for each `model_type`, where the adapters library puts bottleneck adapters. Each position has a
# target, which is a module of the base.
#
# In the adapters library, an adapter is a submodule of a block, and replaces the block's residual connection. In
# adapterkit, the adapter changes the output of the target. If the target does not add the residual itself, `residual`
# names the module whose input is the residual. If a norm follows the sum, `norm` names this norm.


@dataclass(frozen=True, slots=True)
class SublayerRule:
    """One position of bottleneck adapters in a block, such as after the attention module.

    The target's path and the path of the module that contains the adapter begin alike, but may end differently.

    Attributes:
        models: the values of `model_type` for the models that have this position.
        module: the end of the path of the module that contains the adapter in the adapters library.
        target: the end of the path of the target, whose output changes.
        flag: the config field that switches this position on: `mh_adapter`, `output_adapter` or `cross_adapter`.
        residual: the name of the module whose input is the residual, which is added to the target's output. This module
            and the target have the same parent. Empty if the target adds the residual itself.
        norm: the name of the module that normalises the sum of residual and output. This module and the target have the
            same parent. Empty if the target normalises the sum itself, or if no norm follows the sum.
        within: a path component, such as `decoder`. The rule fits only paths that have this component before
            `module` or `target`. Empty if the rule has no such condition.
    """

    models: tuple[str, ...]
    module: str
    target: str
    flag: str
    residual: str = ""
    norm: str = ""
    within: str = ""


BERT_POSITIONS = ("bert", "bert-generation", "electra", "roberta", "xlm-roberta")
LLAMA_POSITIONS = ("llama", "mistral", "qwen2", "qwen3")
T5_POSITIONS = ("mt5", "t5")
PRE_NORM_BART = ("mbart", "whisper")

RULES = (
    SublayerRule(BERT_POSITIONS, ".crossattention.output", ".crossattention.output", "mh_adapter"),
    SublayerRule(BERT_POSITIONS, ".attention.output", ".attention.output", "mh_adapter"),
    SublayerRule(BERT_POSITIONS, ".output", ".output", "output_adapter"),
    SublayerRule(("vit",), ".output.output_adapters", ".output", "output_adapter"),
    SublayerRule(("vit",), ".attention_adapters", ".attention", "mh_adapter", "layernorm_before"),
    SublayerRule(("distilbert",), ".attention_adapters", ".attention", "mh_adapter", "attention", "sa_layer_norm"),
    SublayerRule(("distilbert",), ".output_adapters", ".ffn", "output_adapter", "ffn", "output_layer_norm"),
    SublayerRule(("gpt2",), ".attention_adapters", ".attn", "mh_adapter", "ln_1"),
    SublayerRule(("gpt2",), ".output_adapters", ".mlp", "output_adapter", "ln_2"),
    SublayerRule(LLAMA_POSITIONS, ".attention_adapters", ".self_attn", "mh_adapter", "input_layernorm"),
    SublayerRule(LLAMA_POSITIONS, ".output_adapters", ".mlp", "output_adapter", "post_attention_layernorm"),
    SublayerRule(T5_POSITIONS, ".layer.0", ".layer.0.SelfAttention", "mh_adapter", "layer_norm"),
    SublayerRule(T5_POSITIONS, ".layer.1", ".layer.1.EncDecAttention", "cross_adapter", "layer_norm", within="decoder"),
    SublayerRule(T5_POSITIONS, ".layer.1", ".layer.1.DenseReluDense", "output_adapter", "layer_norm", within="encoder"),
    SublayerRule(T5_POSITIONS, ".layer.2", ".layer.2.DenseReluDense", "output_adapter", "layer_norm", within="decoder"),
    SublayerRule(
        ("bart", "plbart"), ".attention_adapters", ".self_attn", "mh_adapter", "self_attn", "self_attn_layer_norm"
    ),
    SublayerRule(("bart", "plbart"), ".output_adapters", ".fc2", "output_adapter", "fc1", "final_layer_norm"),
    SublayerRule(
        ("bart", "plbart"), ".cross_attention_adapters", ".encoder_attn", "cross_adapter", "encoder_attn",
        "encoder_attn_layer_norm",
    ),
    SublayerRule(PRE_NORM_BART, ".attention_adapters", ".self_attn", "mh_adapter", "self_attn_layer_norm"),
    SublayerRule(PRE_NORM_BART, ".output_adapters", ".fc2", "output_adapter", "final_layer_norm"),
    SublayerRule(
        PRE_NORM_BART, ".cross_attention_adapters", ".encoder_attn", "cross_adapter", "encoder_attn_layer_norm"
    ),
)  # fmt: skip
"""All rules. The first rule that fits applies, so rules with more specific endings come first."""

MODELS = frozenset(chain.from_iterable(rule.models for rule in RULES))

EMBEDDINGS = {
    **dict.fromkeys((*BERT_POSITIONS, "distilbert", "vit"), "embeddings"),
    **dict.fromkeys(LLAMA_POSITIONS, "embed_tokens"),
    "gpt2": "drop",
}
"""A map from `model_type` to the name of the module whose output is the input of the first layer.

Invertible adapters change this module's output. Prompts are prepended to this module's output.
"""


def standing(path: str, model_type: str | None) -> tuple[str, SublayerRule] | None:
    """Return (path of the target, rule) for the path of a module that contains an adapter; None if no rule fits."""
    rule_found = next((rule for rule in _rules(model_type) if _fits(path, rule.module, rule)), None)
    return None if rule_found is None else (path.removesuffix(rule_found.module) + rule_found.target, rule_found)


def hanging(path: str, residual: str, norm: str, model_type: str | None) -> tuple[str, SublayerRule] | None:
    """Return (path of the module that contains the adapter, rule) for the path of a target; None if no rule fits."""
    for rule in _rules(model_type):
        if _fits(path, rule.target, rule) and (rule.residual, rule.norm) == (residual, norm):
            return path.removesuffix(rule.target) + rule.module, rule
    return None


def _rules(model_type: str | None) -> Iterator[SublayerRule]:
    return (rule for rule in RULES if model_type is None or model_type in rule.models)


def _fits(path: str, ending: str, rule: SublayerRule) -> bool:
    stem = path.removesuffix(ending)
    return path.endswith(ending) and stem != path and (not rule.within or rule.within in stem.split("."))
