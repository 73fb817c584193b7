"""torchtune: its own LoRA layers and checkpoints."""

import json

import numpy as np
import torch
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt

from .base import randomize

CASES = {"lora": False, "dora": True}
FILE = "adapter_model.pt"
SIZES = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "head_dim": 4}


def _model(base, dora):
    model = lora_llama3(
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=12,
        num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=16, max_seq_len=32, intermediate_dim=24, lora_rank=2,
        lora_alpha=8, use_dora=dora,
    )  # fmt: skip
    state = hf_to_tune({name: torch.from_numpy(value.copy()) for name, value in base.items()}, **SIZES)
    missing, unexpected = model.load_state_dict(state, strict=False)
    lacking = [name for name in missing if "lora" not in name and "magnitude" not in name]
    if unexpected or lacking:
        raise ValueError(f"not the base's names: {unexpected}, {lacking}")
    return model


def write(folder, base, case):
    """Lets the tool save an adapter."""
    model = _model(base, CASES[case])
    if CASES[case]:
        for module in model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
    randomize(p for name, p in model.named_parameters() if "lora_" in name)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.25
    torch.save(get_adapter_state_dict(model.state_dict()), folder / FILE)
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merged(folder, base):
    """What the tool loads from a folder, folded into the base."""
    adapter = torch.load(folder / FILE, weights_only=True)
    rank = next(value.shape[0] for name, value in adapter.items() if "lora_a" in name)
    settings = folder / "torchtune.json"
    alpha = json.loads(settings.read_text())["alpha"] if settings.exists() else 8
    model = _model(base, any("magnitude" in name for name in adapter))
    held = {name: value for name, value in model.state_dict().items() if "lora" not in name and "magnitude" not in name}
    result = tune_to_hf(get_merged_lora_ckpt(held | adapter, rank, alpha), **SIZES)
    names = {name for name in base if "_proj" in name}
    return {name: np.asarray(result[name]) for name in names}
