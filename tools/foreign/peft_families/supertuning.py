"""Super-Tuning."""

from typing import Any

from peft import SupertuningConfig
from peft.tuners.supertuning.layer import SupertuningLayer

from adapterkit.methods.supertuning import SuperTuning

CASES = {
    "supertuning": ("Layers", SupertuningConfig(sparsity=0.8, target_modules=["q", "up"])),
    "supertuning_hybrid": ("Layers", SupertuningConfig(sparsity=0.5, r=2, lora_alpha=3, target_modules=["q", "up"])),
}


def update_of(_path: str, layer: Any, _config: Any) -> SuperTuning | None:
    """Positions, values, and the LoRA beside them."""
    if not isinstance(layer, SupertuningLayer):
        return None
    rank = layer.supertuning_rank["default"]
    hybrid: dict[str, Any] = {}
    if rank:
        hybrid = {"A": layer.supertuning_lora_A["default"].weight, "B": layer.supertuning_lora_B["default"].weight}
        hybrid["scaling"] = layer.supertuning_lora_alpha["default"] / rank
    return SuperTuning(index=layer.supertuning_indices["default"], values=layer.supertuning_values["default"], **hybrid)
