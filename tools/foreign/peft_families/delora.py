"""DeLoRA."""

from typing import Any

from peft import DeloraConfig
from peft.tuners.delora.layer import DeloraLayer

from adapterkit.methods.delora import DeLoRA

CASES = {"delora": ("Layers", DeloraConfig(r=2, rank_pattern={"up": 3}, target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> DeLoRA | None:
    """Directions, strength, and the norms of the base's columns."""
    if not isinstance(layer, DeloraLayer):
        return None
    return DeLoRA(
        A=layer.delora_A["default"], B=layer.delora_B["default"], strength=layer.delora_lambda["default"],
        w_norm=layer.delora_w_norm["default"],
    )  # fmt: skip
