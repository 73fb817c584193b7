"""VB-LoRA, with all logits; what is left of them is another's to check, since PEFT holds logits in memory."""

from typing import Any

from peft import VBLoRAConfig
from peft.tuners.vblora.layer import VBLoRALayer

from adapterkit.methods.vblora import VBLoRA

CASES = {"vblora": ("Layers", VBLoRAConfig(r=2, num_vectors=5, vector_length=2, topk=3, target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> VBLoRA | None:
    """Logits and the shared bank."""
    if not isinstance(layer, VBLoRALayer):
        return None
    logits = {"logits_A": layer.vblora_logits_A["default"], "logits_B": layer.vblora_logits_B["default"]}
    return VBLoRA(bank=layer.vblora_vector_bank["default"], **logits, topk=layer.topk["default"])
