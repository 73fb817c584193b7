"""DEFT and PaRa."""

from typing import Any

from peft import DeftConfig
from peft.tuners.deft.layer import DeftLayer

from adapterkit.methods.deft import DEFT

MODULES = ["q", "up"]
CASES = {
    "deft": ("Layers", DeftConfig(r=5, alpha=3, decomposition_method="qr", target_modules=MODULES)),
    "para": ("Layers", DeftConfig(r=2, para=True, target_modules=MODULES)),
}


def update_of(_path: str, layer: Any, _config: Any) -> DEFT | None:
    """P, R, and how P projects."""
    if not isinstance(layer, DeftLayer):
        return None
    R = None if layer.deft_para["default"] else layer.deft_R["default"]
    orthogonal = layer.deft_decomposition["default"] == "qr"
    return DEFT(P=layer.deft_P["default"], R=R, orthogonal=orthogonal, scaling=layer.deft_scaling["default"])
