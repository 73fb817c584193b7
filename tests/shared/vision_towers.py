"""A vision-language model in its published layout, with queries and keys in Meta's row order."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4, "index_n_heads": 2, "index_head_dim": 4,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# Use four heads here and two above, because the tower's rows must not depend on the language model's heads.
VISION = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 2,
    "image_size": 8, "pos_emb_height": 4, "pos_emb_width": 4, "head_dim": 8,
}  # fmt: skip


def model(family):
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    parts = {"text_config": TEXT, "vision_config": VISION}
    small = {
        name: {"model_type": getattr(known, name).model_type}
        | {key: value for key, value in fields.items() if hasattr(getattr(known, name), key)}
        for name, fields in parts.items()
    }
    config = AutoConfig.for_model(family, **small, tie_word_embeddings=False, projection_hidden_size=32)
    made = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def as_published(name):
    """Undo the renames of transformers' `save_pretrained` for Kimi: `layers` to `blocks`, and the patch embedding."""
    name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
    return name.replace("model.mm_projector.", "mm_projector.").replace("encoder.patch_embed", "patch_embed")
