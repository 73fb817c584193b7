"""litgpt: its own GPT with LoRA, its own merge, its own way back to transformers' names."""

import dataclasses

import lightning
import numpy as np
import torch
import yaml
from litgpt.config import Config as Plain
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama

from .base import randomize

CASES = {
    "qv": {"lora_query": True, "lora_key": False, "lora_value": True, "lora_projection": True, "lora_mlp": True,
           "lora_head": True},
    "qkv": {"lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": False, "lora_mlp": False,
            "lora_head": False},
}  # fmt: skip
FILE = ""
MODEL = {
    "name": "tiny", "block_size": 32, "n_layer": 2, "n_embd": 16, "vocab_size": 12, "padded_vocab_size": 12,
    "n_head": 4, "n_query_groups": 2, "head_size": 4, "rotary_percentage": 1.0, "parallel_residual": False,
    "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 24,
}  # fmt: skip


def _state(base, config):
    state = {}
    copy_weights_hf_llama(config, {}, state, {name: torch.from_numpy(value.copy()) for name, value in base.items()})
    return state


def write(folder, base, case):
    """Lets the tool save an adapter."""
    settings = {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.0, **CASES[case]}
    model = GPT(Config(**MODEL, **settings))
    model.load_state_dict(_state(base, model.config), strict=False)
    randomize(p for name, p in model.named_parameters() if "lora_" in name)
    fabric = lightning.Fabric(devices=1, accelerator="cpu")
    fabric.save(folder / "lit_model.pth.lora", {"model": model}, filter={"model": lora_filter})
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": "checkpoints/tiny", **settings}))
    plain = Plain(**MODEL)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(plain)))


def merged(folder, base):
    """What the tool loads from a folder, folded into the base."""
    settings = yaml.safe_load((folder / "hyperparameters.yaml").read_text())
    parameters = {name: value for name, value in settings.items() if name.startswith("lora_")}
    model = GPT(Config(**MODEL, **parameters))
    loaded = torch.load(folder / "lit_model.pth.lora", weights_only=True)
    model.load_state_dict(_state(base, model.config) | loaded.get("model", loaded))
    merge_lora_weights(model)
    state = {name.replace("linear.", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    result = {}
    copy_weights_llama(Plain(**MODEL), result, state)
    return {n: np.asarray(result[n].detach()) for n in base if "_proj" in n or n == "lm_head.weight"}
