"""GraLoRA."""

from typing import Any

from peft import GraloraConfig
from peft.tuners.gralora.layer import GraloraLayer

from adapterkit.methods.gralora import GraLoRA

CASES = {"gralora": ("Layers", GraloraConfig(r=4, gralora_k=2, hybrid_r=1, alpha=3, target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> GraLoRA | None:
    """Both factors of the blocks, and of the whole."""
    if not isinstance(layer, GraloraLayer):
        return None
    whole = {"A_whole": layer.gralora_A_general["default"].weight, "B_whole": layer.gralora_B_general["default"].weight}
    return GraLoRA(
        A=layer.gralora_A["default"], B=layer.gralora_B["default"], **whole, scaling=layer.scaling["default"]
    )
