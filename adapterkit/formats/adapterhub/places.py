"""Which of a base's linear layers the library adapts, and what its configs call them; by `model_type`.

Endings of module paths in the models of transformers 4, under the words `q`, `k`, `v` of `attn_matrices` and the flags
`intermediate_lora` and `output_lora`. In Llama and Mistral the library calls down_proj the intermediate layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint

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
"""model_type -> name of the layer that holds queries, keys and values in one weight."""


def model_type_of(base: Checkpoint | None) -> str | None:
    """What the config of a base says."""
    found = (base.config or {}).get("model_type") if base is not None else None
    return found if isinstance(found, str) else None


def role(path: str, model_type: str) -> str | None:
    """What configs call the linear layer at a path; None where the library does not adapt it."""
    roles = ROLES.get(model_type, {})
    return next((word for word, endings in roles.items() if f".{path}".endswith(endings)), None)


def family_of_base(paths: Iterable[str], model_type: str | None) -> str | None:
    """A `model_type` under which every path has its role: the given one, or any where all agree on the roles."""
    paths = list(paths)
    if model_type is not None:
        return model_type if model_type in ROLES else None
    fits = {name: tuple(role(path, name) for path in paths) for name in ROLES}
    whole = {name: roles for name, roles in fits.items() if None not in roles}
    return next(iter(whole)) if len(set(whole.values())) == 1 else None
