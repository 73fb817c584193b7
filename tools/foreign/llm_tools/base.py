"""A small Llama: two layers, four heads that ask and two that answer."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 16, "head_dim": 4, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 12,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip

SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip


def write(folder: Path) -> None:
    """Saves it as transformers would."""
    rng = np.random.default_rng(0)
    weights = {"model.embed_tokens.weight": rng.normal(size=(12, 16)), "lm_head.weight": rng.normal(size=(12, 16))}
    weights["model.norm.weight"] = np.ones(16)
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in SHAPES.items():
            weights[f"model.layers.{layer}.{name}.weight"] = rng.normal(size=shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.astype("f4") for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2, sort_keys=True) + "\n")


def read(folder: Path) -> dict[str, np.ndarray]:
    """Its weights by name."""
    return load_file(folder / "model.safetensors")


def randomize(parameters) -> None:
    """Puts numbers into torch parameters that are not zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
