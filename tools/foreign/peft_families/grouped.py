"""LoRA and DoRA of convolutions in groups, of which A reads all channels."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer

from adapterkit.methods import METHODS

CASES = {
    "lora_groups": ("Grouped", LoraConfig(r=4, lora_alpha=3, target_modules=["one", "two", "plain"], lora_bias=True)),
    "dora_groups": ("Grouped", LoraConfig(r=4, lora_alpha=3, target_modules=["one", "two", "plain"], use_dora=True)),
}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped convolution in groups."""
    if not isinstance(module, LoraLayer) or getattr(module.get_base_layer(), "groups", 1) == 1:
        return None
    A, B = module.lora_A["default"].weight, module.lora_B["default"]
    flat = B.weight.flatten(1)
    magnitude = getattr(module.lora_magnitude_vector, "default", None) if module.lora_magnitude_vector else None
    if magnitude is not None:
        held = {"A": A, "B": flat, "magnitude": magnitude.weight.flatten()}
        return METHODS["grouped_dora"](**held, scaling=module.scaling["default"], regrouped=True)
    return METHODS["grouped_lora"](A=A, B=flat, bias=B.bias, scaling=module.scaling["default"])
