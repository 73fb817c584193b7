"""Tied weights: which output head shares the tensor of which input embedding.

A checkpoint stores a tied tensor once, under the embedding's name. Names are those of transformers' model families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS = ("lm_head", "embed_out", "output", "cls.predictions.decoder", "lm_head.decoder", "vocab_projector")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "tokens_embed")


def find_tie(names: Mapping[str, Any], config: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """(name of the absent head weight, name of the embedding weight it shares), or None where nothing is tied."""
    if any(_is(name, HEADS) for name in names) or not _says_tied(config):
        return None
    embeddings = [name for name in names if _is(name, EMBEDDINGS)]
    return (f"{_head_of(config)}.weight", embeddings[0]) if len(embeddings) == 1 else None


def aliases(names: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, str]:
    """A tied head's name -> the name of the embedding that it shares; empty where nothing is tied."""
    tie = find_tie(names, config)
    return {} if tie is None else {tie[0]: tie[1]}


def is_embedding(name: str) -> bool:
    """Whether a stored tensor is the table of a model's token embeddings."""
    return _is(name, EMBEDDINGS)


def _says_tied(config: Mapping[str, Any] | None) -> bool:
    """The config's word; where it has none, a model with a head and no head weight must share it."""
    if config is None:
        return False
    explicit = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    if explicit is not None:
        return bool(explicit)
    return any(a.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM")) for a in config.get("architectures") or ())


def _is(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == f"{module}.weight" or name.endswith(f".{module}.weight") for module in modules)


def _head_of(config: Mapping[str, Any] | None) -> str:
    family = str((config or {}).get("model_type"))
    return {"gpt_neox": "embed_out", "bert": "cls.predictions.decoder", "distilbert": "vocab_projector"}.get(
        family, "lm_head"
    )
