"""What LoraConfig switches on: KaSA, BD-LoRA, PiSSA, OLoRA."""

from typing import Any

from peft import BdLoraConfig, KasaConfig, LoraConfig
from peft.tuners.lora.layer import LoraLayer

from adapterkit.methods.bdlora import BDLoRA
from adapterkit.methods.kasa import KaSA
from adapterkit.methods.olora import OLoRA
from adapterkit.methods.pissa import PiSSA

BLOCKS = BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["q"], nblocks=2)


def config(**options: Any) -> LoraConfig:
    """LoRA on every linear layer of the blocks."""
    return LoraConfig(r=2, lora_alpha=3, target_modules=["q", "up"], **options)


CASES = {
    "bdlora": ("Layers", config(use_bdlora=BLOCKS)),
    "kasa": ("Layers", config(kasa_config=KasaConfig())),
    "olora": ("Layers", config(init_lora_weights="olora", rank_pattern={"up": 3})),
    "pissa": ("Layers", config(init_lora_weights="pissa", alpha_pattern={"up": 5})),
}


def update_of(_path: str, layer: Any, config: Any) -> Any:
    """The two factors, and what the formula has besides; nothing for plain LoRA."""
    if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
        return None
    A, B, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    if config.kasa_config is not None:
        return KaSA(A=A, B=B, diag=layer.lora_diag["default"], scaling=scaling)
    if config.use_bdlora is not None and layer.lora_A["default"].in_features == 4:
        return BDLoRA(A_blocks=A.reshape(2, 1, 2), B=B, scaling=scaling)
    if config.use_bdlora is not None:
        return BDLoRA(A=A, B_blocks=B.reshape(2, 2, 1), scaling=scaling)
    formula = {"olora": OLoRA, "pissa": PiSSA}.get(str(config.init_lora_weights))
    return None if formula is None else formula(A=A, B=B, scaling=scaling)
