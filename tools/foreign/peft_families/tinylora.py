"""TinyLoRA."""

from typing import Any

from peft import TinyLoraConfig
from peft.tuners.tinylora.layer import TinyLoraLayer

from adapterkit.methods.tinylora import TinyLoRA

CASES = {"tinylora": ("Layers", TinyLoraConfig(r=2, u=3, weight_tying=0.5, target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> TinyLoRA | None:
    """The frozen frame, and the v of the layer's group."""
    if not isinstance(layer, TinyLoraLayer):
        return None
    v = layer.tinylora_v["default"][layer._tinylora_v_key["default"]]
    return TinyLoRA(A=layer.tinylora_A["default"], B=layer.tinylora_B["default"], P=layer.tinylora_P["default"], v=v)
