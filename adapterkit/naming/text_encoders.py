"""The text encoders of image models, CLIP and T5, as transformers names them."""

from __future__ import annotations

_CLIP_LAYER = (
    *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm1",
    "layer_norm2",
)

CLIP = (
    *(f"text_model.encoder.layers.#.{part}" for part in _CLIP_LAYER),
    "text_model.final_layer_norm",
    "text_model.embeddings.token_embedding",
    "text_model.embeddings.position_embedding",
    "text_projection",
)

_T5_BLOCK = (
    *(f"layer.0.SelfAttention.{x}" for x in "qkvo"),
    "layer.0.SelfAttention.relative_attention_bias",
    "layer.0.layer_norm",
    *(f"layer.1.DenseReluDense.{x}" for x in ("wi", "wi_0", "wi_1", "wo")),
    "layer.1.layer_norm",
)

T5 = (*(f"encoder.block.#.{part}" for part in _T5_BLOCK), "encoder.final_layer_norm", "shared", "encoder.embed_tokens")
