"""LN tuning."""

from typing import Any

from peft import LNTuningConfig
from peft.tuners.ln_tuning.layer import LNTuningLayer

from adapterkit.methods.replacement import Replacement

CASES = {"ln_tuning": ("Layers", LNTuningConfig(target_modules=["head.1", "q", "conv2"]))}


def update_of(_path: str, layer: Any, _config: Any) -> Replacement | None:
    """The copy of the module."""
    if not isinstance(layer, LNTuningLayer):
        return None
    copy = layer.ln_tuning_layers["default"]
    return Replacement(weight=copy.weight, bias=copy.bias)
