"""MLX-LM: its own llama, its own LoRA layers, its own files."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config

from .base import CONFIG

FILE = ""
CASES = {"lora": {"rank": 2, "scale": 10.0}, "dora": {"rank": 2, "scale": 1.5}}


def _model(base):
    args = llama.ModelArgs.from_dict({**CONFIG, "rope_traditional": False})
    model = llama.Model(args)
    model.load_weights([(name, mx.array(value)) for name, value in base.items()])
    return model


def write(folder, base, case):
    """Lets the tool save an adapter."""
    model = _model(base)
    model.freeze()
    kind = "dora" if case == "dora" else "lora"
    keys = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
    parameters = {**CASES[case], "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    mx.random.seed(3)
    trained = {
        name: mx.random.normal(value.shape) / 4 if name.endswith(("lora_a", "lora_b")) else value * 1.25
        for name, value in tree_flatten(model.trainable_parameters())
    }
    save_config(
        {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}, folder / "adapter_config.json"
    )
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)


def merged(folder, base):
    """What the tool loads from a folder, folded into the base."""
    model = _model(base)
    load_adapters(model, str(folder))
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    return {f"{name}.weight": np.array(module.weight) for name, module in fused}
