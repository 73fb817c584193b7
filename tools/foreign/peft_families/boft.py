"""BOFT."""

from __future__ import annotations

from typing import Any

from peft import BOFTConfig
from peft.tuners.boft.layer import BOFTLayer

from adapterkit.methods import METHODS

CASES = {"boft": ("Layers", BOFTConfig(boft_block_size=2, target_modules=["q", "up", "point"]))}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module."""
    if not isinstance(module, BOFTLayer):
        return None
    return METHODS["boft"](R=module.boft_R["default"], s=module.boft_s["default"].flatten())
