"""BEFT."""

from typing import Any

from peft import BeftConfig
from peft.tuners.beft.layer import BeftLayer

from adapterkit.methods.dense import Dense

CASES = {"beft": ("Layers", BeftConfig(target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> Dense | None:
    """The bias that is added."""
    return Dense(d=layer.beft_bias["default"].flatten()) if isinstance(layer, BeftLayer) else None
