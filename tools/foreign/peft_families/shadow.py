"""Shadow: blocks of a model, and one network beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import ShadowConfig
from peft.tuners.shadow.layers import ShadowLayer

import adapterkit as ak
from adapterkit.methods import METHODS

SMALL = {"shadow_hidden_size": 2, "shadow_num_attention_heads": 1, "shadow_intermediate_size": 3}
CASES = {
    "shadow": ("llama", ShadowConfig(r=2, task_type="CAUSAL_LM", shadow_alpha=0.5)),
    "shadow_narrow": ("llama", ShadowConfig(r=2, update_hidden_size=3, share_embeddings=False, **SMALL)),
}


def update_of(_path: str, _module: Any, _config: Any) -> Any:
    """None: what a block has in common with the others is the model's."""
    return None


def updates_of_model(model: Any, config: Any) -> Iterator[tuple[ak.Target, Any]]:
    """Every block's update, the network's tensors in the order of their names."""
    tuner = model.base_model
    tensors = dict(sorted(tuner.shadow_backbone["default"].state_dict().items()))
    projection = getattr(tuner.shadow_projection["default"], "weight", None)
    shared = {
        "network": torch.cat([tensor.flatten() for tensor in tensors.values()]),
        "projection": projection,
        "names": "\n".join(" ".join([name, *map(str, tensor.shape)]) for name, tensor in tensors.items()),
        "layers": config.shadow_num_hidden_layers or 1,
        "heads": config.shadow_num_attention_heads or 0,
        "inner": config.shadow_intermediate_size or 0,
        "shared_embeddings": tuner._shadow_share_embeddings["default"],
        "alpha": config.shadow_alpha,
    }
    for path, module in tuner.model.named_modules():
        if isinstance(module, ShadowLayer):
            own = {name: getattr(module, f"shadow_{name}")["default"].weight for name in ("down", "up")}
            for name in ("transform", "gate"):
                first, _, last = getattr(module, f"shadow_update_{name}")["default"]
                own |= {f"{name}_in": first.weight, f"{name}_in_bias": first.bias}
                own |= {f"{name}_out": last.weight, f"{name}_out_bias": last.bias}
            yield ak.Target(path), METHODS["shadow"](**own, **shared)
