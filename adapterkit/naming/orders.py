"""Sort modules in the order in which a model declares them, by the `model_type` of its config.

Tools that number modules, or draw random values module by module, depend on this order. Safetensors files do not record
it, because their tensors are sorted by name. Source: the modelling files of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint


def declared_by(base: Checkpoint | None) -> tuple[str, ...]:
    """List a base's tensors in the order in which the model declares them.

    Empty unless the base is a single torch file.
    """
    one = base is not None and len(base.files) == 1 and base.files[0].suffix in TORCH
    return tuple(base.tensors) if base is not None and one else ()


TORCH = frozenset({".bin", ".pt", ".pth"})
"""Suffixes of torch files, which keep the order of a state dict."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a model's modules: endings of paths before the layers, inside each layer, and after the layers."""

    before: tuple[str, ...]
    inside: tuple[str, ...]
    after: tuple[str, ...] = ("lm_head",)

    def place(self, path: str) -> tuple[int, tuple[int, ...], int] | None:
        """Return the sort key of a path; None if the path has none of these endings."""
        for stage, endings in enumerate((self.before, self.inside, self.after)):
            for position, ending in enumerate(endings):
                if path == ending or path.endswith(f".{ending}"):
                    return stage, tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", f".{path}"))), position
        return None


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA = Order(("embed_tokens",), (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_NEOX = ("dense_h_to_4h", "dense_4h_to_h")
_BERT = Order(
    ("word_embeddings",),
    (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense",
    ),
    ("pooler.dense",),
)  # fmt: skip
ORDERS = {
    **dict.fromkeys(("cohere", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2"), _LLAMA),
    **dict.fromkeys(("qwen2", "qwen3", "stablelm"), _LLAMA),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "bloom": Order(
        ("word_embeddings",),
        ("self_attention.query_key_value", "self_attention.dense", *(f"mlp.{name}" for name in _NEOX)),
    ),
    "gpt2": Order(("wte", "wpe"), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": Order(
        ("embed_in",), ("attention.query_key_value", "attention.dense", *(f"mlp.{name}" for name in _NEOX))
    ),
    "gptj": Order(
        ("wte",), ("attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
    ),
    "opt": Order(
        ("embed_tokens", "embed_positions"),
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
    ),
    "phi": Order(("embed_tokens",), (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "phi3": Order(
        ("embed_tokens",), ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "starcoder2": Order(("embed_tokens",), (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")),
}  # fmt: skip
"""The order of modules, by model_type."""


def in_order(
    paths: Collection[str], config: Mapping[str, object] | None, declared: Sequence[str] = ()
) -> list[str] | None:
    """Sort paths in the order in which the base's model declares them; None if the order is unknown.

    Args:
        paths: the paths of modules.
        config: the base's config; its `model_type` may be in the table.
        declared: the result of `declared_by` for the base. If not empty, it is used instead of the table.
    """
    if len(paths) == 1:
        return list(paths)
    if declared:
        position = {name.rpartition(".")[0]: i for i, name in reversed(list(enumerate(declared)))}
        return sorted(paths, key=position.__getitem__) if set(paths) <= position.keys() else None
    order = ORDERS.get(str((config or {}).get("model_type")))
    places = {} if order is None else {path: order.place(path) for path in paths}
    known = {path: place for path, place in places.items() if place is not None}
    return sorted(paths, key=lambda path: known[path]) if paths and len(known) == len(paths) else None
