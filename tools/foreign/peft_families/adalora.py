"""AdaLoRA."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer

from adapterkit.methods import METHODS

LEFT = {"block.0.q.lora_E": [True, False, True], "block.1.up.lora_E": [False, False, False]}
GIVEN: dict[str, Any] = {"init_r": 3, "target_r": 2, "total_step": 10, "lora_alpha": 5}

CASES = {
    "adalora": ("Layers", AdaLoraConfig(target_modules=["q", "conv2"], **GIVEN)),
    "adalora_pruned": ("Layers", AdaLoraConfig(target_modules=["q", "up"], rank_pattern=LEFT, **GIVEN)),
}


def update_of(path: str, module: Any, config: Any) -> Any:
    """The update of a wrapped module, which still holds the rows that the file lacks."""
    if not isinstance(module, AdaLoraLayer):
        return None
    A, B, E = (getattr(module, f"lora_{name}")["default"] for name in "ABE")
    left = (config.rank_pattern or {}).get(f"{path}.lora_E", [True] * len(E))
    scaling = module.scaling["default"] / (config.init_r + 1e-5)
    return METHODS["adalora"](A=A[left], B=B[:, left], E=E[left].flatten(), scaling=scaling)
