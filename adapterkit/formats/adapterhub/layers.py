"""List the linear layers that the adapters library can adapt, and write configs that select some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...naming.binding.fitting import biasless
from ..peft.alphas import exact_alpha
from .file import make

if TYPE_CHECKING:
    from ...core.adapter import Target, Updates
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue


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
    found = (base.config or {}).get("model_type") if base is not None else None
    return found if isinstance(found, str) else None


def role(path: str, model_type: str) -> str | None:
    """Return the word by which configs select the linear layer at a path.

    None if the adapters library does not adapt the layer.
    """
    roles = ROLES.get(model_type, {})
    return next((word for word, endings in roles.items() if f".{path}".endswith(endings)), None)


def family_of_base(paths: Iterable[str], model_type: str | None) -> str | None:
    """Return a `model_type` in which the adapters library can adapt every path; None if there is no such type.

    If `model_type` is None, try all types. If several types fit, all must use the same words for the paths.
    """
    paths = list(paths)
    if model_type is not None:
        return model_type if model_type in ROLES else None
    fits = {name: tuple(role(path, name) for path in paths) for name in ROLES}
    whole = {name: roles for name, roles in fits.items() if None not in roles}
    return next(iter(whole)) if len(set(whole.values())) == 1 else None


# A new config for LoRA and similar methods has one rank and scaling for all layers, and words for kinds of layers.
# The adapters library adapts all layers of these kinds. A layer without tensors in the file gets a new adapter, which
# has no effect.


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
    first = _law(next(iter(updates.values()))[0])
    for target, found in updates.items():
        for position, update in enumerate(found):
            why = _why_not(target, update, base) or ("" if position == 0 else "the module has a second update")
            if not why and _law(update) != first:
                why = "its method, rank or scaling differs from the others; a config states one of each"
            if why:
                yield target, position, why
    yield from _unplaced(updates, base)


def _law(update: Any) -> tuple[object, ...]:
    if update.method == "ia3":
        return (update.method,)
    shared = (id(update.A), id(update.B)) if update.method == "vera_matrices" else ()
    return update.method, int(update.A.shape[0]), update.attributes.get("scaling"), shared


def _numbers(update: Any) -> tuple[int, int | float]:
    """Return the rank and the alpha. `losses` must have checked that an alpha exists; IA3 ignores both."""
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

    The adapters library computes the method `dora_outputs` instead. Both methods are equal if the scaling is 1 and the
    layer has no bias.
    """
    if target.layout != "out *in":
        return "the adapters library has no dora on a weight stored as [in, out]"
    if update.scaling != 1:
        return "the scaling of this dora is not 1, but the adapters library computes the norm with 1"
    if base is None:
        return "the adapters library's dora scales a bias, and only the base shows whether the layer has one"
    return "" if biasless(base, target.path) else "the layer has a bias, which the adapters library's dora would scale"


def on_outputs(updates: Updates, base: Checkpoint | None) -> Updates:
    """Replace each DoRA with `dora_outputs`, which the adapters library has, if both compute the same function."""
    return {target: tuple(_on_outputs(target, update, base) for update in found) for target, found in updates.items()}


def _on_outputs(target: Target, update: Any, base: Checkpoint | None) -> Any:
    if update.method != "dora" or len(update.A.shape) != 2 or _why_not_dora(target, update, base):
        return update
    return make("dora_outputs", update.tensors, scaling=update.scaling)


def _words(updates: Updates, base: Checkpoint | None) -> set[str]:
    """Return the words by which a config selects the kinds of all adapted layers."""
    model_type = base_family(updates, base) or ""
    words: set[str] = set()
    for target in updates:
        word = role(target.path, model_type) or ""
        size = target.rows[1] - target.rows[0] if target.rows else 0
        words.add(QKV[target.rows[0] // size] if word == "qkv" and target.rows else word)
    return words


def base_family(updates: Updates, base: Checkpoint | None) -> str | None:
    """Return the model type in the base's config; without a base, a type that fits the targets' paths."""
    return family_of_base((target.path for target in updates), model_type_of(base))


def _unplaced(updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
    """Yield targets that a config cannot select. A config selects kinds of modules, not single modules."""
    family = base_family(updates, base)
    for target, found in updates.items():
        word = role(target.path, family or "")
        if family is None:
            why = "the kinds of these layers are unknown; give the base with --base (base=)"
        elif word is None:
            why = f"the adapters library does not adapt this layer of {family}"
        elif (word == "qkv") != (target.rows is not None):
            why = "it adapts all of a fused weight" if target.rows is None else "it adapts only some rows of a weight"
        elif target.rows is not None and not _third(target.rows):
            why = "its rows are not a third of a fused weight"
        else:
            continue
        yield from ((target, position, f"{found[position].method}: {why}") for position in range(len(found)))


def _third(rows: tuple[int, int]) -> bool:
    start, size = rows[0], rows[1] - rows[0]
    return start % size == 0 and start // size < 3
