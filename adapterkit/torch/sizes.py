"""What a model says of itself: its embedding, its layers and heads, whether it has an encoder beside its decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import Unsupported


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model has an encoder whose input is its own."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)) and hasattr(
        module, "get_encoder"
    )


def sizes_of(module: nn.Module) -> dict[str, int]:
    """`layers`, `heads` and `d` of the past keys and values of a model, as far as its config tells; a decoder's."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    queries, heads = _first(config, "num_attention_heads"), _first(config, "num_key_value_heads", "num_attention_heads")
    d, width = _first(config, "head_dim", "d_kv"), _first(config, "hidden_size")
    d = width // queries if not d and width and queries else d
    found = {"layers": _first(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers"), "heads": heads}
    return {name: size for name, size in {**found, "d": d}.items() if size}


def _first(config: Any, *names: str) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def embedding_of(module: nn.Module) -> nn.Module:
    """What turns a model's token numbers into embeddings.

    Raises:
        Unsupported: the model does not say.
    """
    model: Any = module
    found = model.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    if not isinstance(found, nn.Module) or not isinstance(getattr(found, "weight", None), Tensor):
        why = f"a {type(module).__name__} does not say what embeds its tokens"
        raise Unsupported(why, cure="Give it a get_input_embeddings() that returns that module")
    return found
