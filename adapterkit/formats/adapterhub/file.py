"""Parse the settings and keys of AdapterHub files, compose keys for writers, and list the layers that keys may name."""

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

# Define the top-level fields of a config, one of which is the release that wrote the config.


LIBRARY = "adapters."
"""The prefix of `version` in configs of the `adapters` library. Configs of adapter-transformers lack this prefix."""

RELEASE = "adapters.1.3.0"
"""The `version` in new configs."""

UNSCALED_UNTIL = ((1, 1, 0), True)
"""Before this release, the adapters library trained LoRA without a scaling."""

Release = tuple[tuple[int, ...], bool]
"""(the release's numbers, whether the release is final). In this form, `1.1.0.dev0` sorts before `1.1.0`."""


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
        """Whether training used no scaling, because a release of `adapters` before 1.1 wrote the file.

        These releases trained LoRA without the scaling `alpha / r`.
        """
        release = _release(self.version)
        return release is not None and release < UNSCALED_UNTIL


def _release(version: str | None) -> Release | None:
    """Parse a release of `adapters`; return None for other texts, such as releases of adapter-transformers."""
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
"""A map from the kind of tensor that a key names to today's name of this kind.

Only releases of adapter-transformers before 2 wrote the names that differ from today's names.
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
        Malformed: a key does not belong to an adapter with this name.
    """
    return {parse_key(text, name): tensor for text, tensor in tensors.items()}


def parse_key(text: str, name: str) -> AdapterHubKey:
    """Parse one key.

    Raises:
        Malformed: the key does not belong to an adapter with this name.
    """
    match = _KEY.fullmatch(text)
    if match is None:
        why, cure = f"this is not a key of the adapter {name!r}", "Remove the tensor, or save the adapter again"
        raise Malformed(why, where=text, cure=cure)
    if match["name"] != name:
        why = f"the key belongs to the adapter {match['name']!r}, but the config belongs to {name!r}"
        raise Malformed(why, where=text, cure="Save each adapter in its own folder")
    return AdapterHubKey(text, match["path"] or "", KINDS[match["kind"]], match["slot"])


# A key contains the target's path, the adapter's name, and the path of the base inside the saved model.


INNER = ("blocks", "decoder", "embeddings", "encoder", "h", "layer", "layers", "transformer.layer")
"""Words with which paths begin if the saved model has no head. In such a model, paths have no prefix for the base."""


@dataclass(frozen=True, slots=True)
class AdapterHubNaming:
    """The names that occur in all keys of one file.

    Attributes:
        name: the adapter's name.
        model_type: the model type of the base, or None.
        root: the path of the base inside the saved model; empty if the saved model is the base.
    """

    name: str
    model_type: str | None = None
    root: str = ""

    def key(self, path: str, kind: str, slot: str) -> str:
        """Return the key of a module's slot."""
        return ".".join(part for part in (path, kind, self.name, slot) if part)

    def at_root(self, name: str = "") -> str:
        """Return the path that keys use for a tensor that the whole model shares."""
        return ".".join(part for part in (self.root, name) if part)


def root_of(paths: Iterable[str]) -> str:
    """Return the path of the base inside the saved model: the first part of all targets' paths.

    Return an empty string if the first parts differ, or if the saved model has no head.
    """
    first = {path.partition(".")[0] for path in paths if path}
    return first.pop() if len(first) == 1 and not first & {*INNER} else ""


# Describe the part of a file that belongs to one config. The config's family finds updates in this part.


@dataclass(frozen=True, slots=True, eq=False)
class AdapterHubPart:
    """The part of a file that one config describes: the whole file, or one member of a union.

    Attributes:
        settings: the settings outside the sub-dict `config`.
        method_fields: the fields of this config.
        tensors: the tensors by parsed key, in the file's order.
        base: the base, or None.
        compat: the caller's `compat`; see `Format`.
        at: the position of this config in the config file, for messages: `config`, or for a member of a union, for
            example `config.configs[1]`.
        heads: the number of heads in a prefix's keys and values; None to read it from the base.
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
        """Group the keys of one kind by module, then by slot.

        Raises:
            Malformed: two keys have the same meaning.
        """
        groups: dict[str, dict[str, AdapterHubKey]] = {}
        for key in self.tensors:
            if key.kind != kind:
                continue
            slots = groups.setdefault(key.path, {})
            if key.slot in slots:
                why = f"this key means the same as {slots[key.slot].text}"
                raise Malformed(why, where=key.text, cure="Save the adapter again with one release of adapters")
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
    """Create an update from a method's name, tensors that are not loaded yet, and attributes."""
    return METHODS[method](**leaves, **attributes)


def take(part: AdapterHubPart, slots: Mapping[str, AdapterHubKey], fields: Mapping[str, str]) -> dict[str, Lazy]:
    """Return the tensors of the slots in `fields`, by field; `fields` maps slots to fields.

    Raises:
        Malformed: the file lacks one of the slots.
    """
    missing = next((slot for slot in fields if slot not in slots), None)
    if missing is not None:
        where = next(iter(slots.values())).text
        raise Malformed(f"the file lacks the matching tensor: {missing}", where=where, cure=AGAIN)
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
    """Return the word by which a config selects the linear layer at a path, such as `q` or `intermediate`.

    For a fused weight, return `qkv`. Return None if the adapters library does not adapt this layer.
    """
    roles = ROLES.get(model_type, {})
    return next((word for word, endings in roles.items() if f".{path}".endswith(endings)), None)


def family_of_base(paths: Iterable[str], model_type: str | None) -> str | None:
    """Return `model_type` if `ROLES` lists the layers of this type of model, otherwise None.

    If `model_type` is None, return a type of model in which the adapters library can adapt the layers at all paths.
    If several types fit, return one of them if all of them select these layers by the same words, otherwise None.
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
    some = next(iter(updates.values()))[0]
    words = _words(updates, base)
    rank, alpha = _numbers(some)
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
    """Yield each update that a new config cannot express, with the reason."""
    first = _formula_key(next(iter(updates.values()))[0])
    for target, group in updates.items():
        for position, update in enumerate(group):
            why = _why_not(target, update, base) or ("" if position == 0 else "the module has a second update")
            if not why and _formula_key(update) != first:
                why = "its method, rank or scaling differs from the other updates', but a config states each only once"
            if why:
                yield target, position, why
    yield from _unplaced(updates, base)


def _formula_key(update: Any) -> tuple[object, ...]:
    if update.method == "ia3":
        return (update.method,)
    shared = (id(update.A), id(update.B)) if update.method == "vera_matrices" else ()
    return update.method, int(update.A.shape[0]), update.attributes.get("scaling"), shared


def _numbers(update: Any) -> tuple[int, int | float]:
    """Return (rank, alpha). `losses` must have checked that an alpha exists. Both have no effect in IA3."""
    rank = 1 if update.method == "ia3" else int(update.A.shape[0])
    return rank, exact_alpha((rank, float(update.attributes.get("scaling", 1.0))), rslora=False) or 0


def _why_not(target: Target, update: Any, base: Checkpoint | None) -> str:
    if target.stacked:
        return f"the adapters library has no {update.method} on stacked experts"
    if update.method == "ia3":
        return "" if update.l is not None else "the adapters library has no ia3 on inputs"
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
    """Return the reason why the adapters library cannot express a DoRA; empty if it can.

    The adapters library has only the method `dora_outputs`. It computes the same as `dora` if the scaling is 1 and the
    layer has no bias.
    """
    if target.layout != "out *in":
        return "the adapters library has no dora on a weight stored as [in, out]"
    if update.scaling != 1:
        return "the scaling of this dora is not 1, but the adapters library computes the norm with a scaling of 1"
    if base is None:
        why = "the adapters library's dora scales a bias, and only the base shows whether the layer has one"
        return f"{why}: pass the base with --base (base=)"
    return "" if biasless(base, target.path) else "the layer has a bias, which the adapters library's dora would scale"


def on_outputs(updates: Updates, base: Checkpoint | None) -> Updates:
    """Replace `dora` with `dora_outputs`, which the adapters library has, if both compute the same function."""
    return {target: tuple(_on_outputs(target, update, base) for update in group) for target, group in updates.items()}


def _on_outputs(target: Target, update: Any, base: Checkpoint | None) -> Any:
    if update.method != "dora" or len(update.A.shape) != 2 or _why_not_dora(target, update, base):
        return update
    return make("dora_outputs", update.tensors, scaling=update.scaling)


def _words(updates: Updates, base: Checkpoint | None) -> set[str]:
    """Return the words by which a config selects all adapted layers."""
    model_type = base_family(updates, base) or ""
    words: set[str] = set()
    for target in updates:
        word = role(target.path, model_type) or ""
        size = target.rows[1] - target.rows[0] if target.rows else 0
        words.add(QKV[target.rows[0] // size] if word == "qkv" and target.rows else word)
    return words


def base_family(updates: Updates, base: Checkpoint | None) -> str | None:
    """Return the `model_type` by which `role` finds the words for these targets; None if the type is unknown.

    This is the `model_type` in the base's config. Without one, it is a type that fits the paths of all targets.
    """
    return family_of_base((target.path for target in updates), model_type_of(base))


def _unplaced(updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
    """Yield each update whose target a config cannot select, with the reason. Configs select only kinds of modules."""
    family = base_family(updates, base)
    for target, group in updates.items():
        word = role(target.path, family or "")
        if family is None:
            why = "the kinds of these layers are unknown; give the base with --base (base=)"
        elif word is None:
            why = f"the adapters library does not adapt this layer of {family}"
        elif (word == "qkv") != (target.rows is not None):
            why = "it adapts all of a fused weight" if target.rows is None else "it adapts only some rows of a weight"
        elif target.rows is not None and not _third(target.rows):
            why = "its rows are not the queries, the keys or the values of a fused weight"
        else:
            continue
        yield from ((target, position, f"{group[position].method}: {why}") for position in range(len(group)))


def _third(rows: tuple[int, int]) -> bool:
    start, size = rows[0], rows[1] - rows[0]
    return start % size == 0 and start // size < 3


# List where the adapters library puts bottleneck adapters, by `model_type`, and the base's module at each position.
#
# In the adapters library, the adapter is a submodule of the block whose residual connection it replaces. In adapterkit,
# the target is the module of the base whose output changes. If the target does not add the residual itself, `residual`
# and `norm` name the modules that show where the residual comes from and which norm follows.


@dataclass(frozen=True, slots=True)
class SublayerRule:
    """One kind of position for adapters.

    The path of the library's module and the path of the target have the same beginning, but different ends.

    Attributes:
        models: the values of `model_type` that have this position.
        module: the end of the path of the adapters library's module, which contains the adapter.
        target: the end of the path of the target, whose output changes.
        flag: the config field that switches this position on: `mh_adapter`, `output_adapter` or `cross_adapter`.
        residual: the name of the module in the target's parent whose input is the residual, which is added to the
            target's output. Empty if the target already adds the residual.
        norm: the name of the module in the target's parent that normalises this sum. Empty if the target already
            normalises the sum, or if no norm follows it.
        within: a component that the common beginning of both paths must have, such as `decoder`; empty if any beginning
            is allowed.
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
"""All rules; more specific endings come first."""

MODELS = frozenset(chain.from_iterable(rule.models for rule in RULES))

EMBEDDINGS = {
    **dict.fromkeys((*BERT_POSITIONS, "distilbert", "vit"), "embeddings"),
    **dict.fromkeys(LLAMA_POSITIONS, "embed_tokens"),
    "gpt2": "drop",
}
"""The path of the last module of the embeddings, by `model_type`.

Invertible adapters change the output of this module, and prompts are prepended to the output.
"""


def standing(path: str, model_type: str | None) -> tuple[str, SublayerRule] | None:
    """Return (path of the target, rule) for the path of the adapters library's module; None if no rule fits."""
    rule_found = next((rule for rule in _rules(model_type) if _fits(path, rule.module, rule)), None)
    return None if rule_found is None else (path.removesuffix(rule_found.module) + rule_found.target, rule_found)


def hanging(path: str, residual: str, norm: str, model_type: str | None) -> tuple[str, SublayerRule] | None:
    """Return (path of the adapters library's module, rule) for the path of a target; None if no rule fits."""
    for rule in _rules(model_type):
        if _fits(path, rule.target, rule) and (rule.residual, rule.norm) == (residual, norm):
            return path.removesuffix(rule.target) + rule.module, rule
    return None


def _rules(model_type: str | None) -> Iterator[SublayerRule]:
    return (rule for rule in RULES if model_type is None or model_type in rule.models)


def _fits(path: str, ending: str, rule: SublayerRule) -> bool:
    stem = path.removesuffix(ending)
    return path.endswith(ending) and stem != path and (not rule.within or rule.within in stem.split("."))
