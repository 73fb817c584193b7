"""Uni-LoRA."""

from typing import Any

from peft import UniLoraConfig
from peft.tuners.unilora.layer import UniLoraLayer

from adapterkit.methods.unilora import UniLoRA

CASES = {"unilora": ("Layers", UniLoraConfig(r=2, theta_d_length=7, save_indices=True, target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> UniLoRA | None:
    """The shared vector, and where each element of a factor lies in it."""
    if not isinstance(layer, UniLoraLayer):
        return None
    return UniLoRA(
        theta=layer.unilora_theta_d["default"],
        indices_A=layer.unilora_indices_A["default"], scales_A=layer.unilora_scales_A["default"],
        indices_B=layer.unilora_indices_B["default"], scales_B=layer.unilora_scales_B["default"],
    )  # fmt: skip
