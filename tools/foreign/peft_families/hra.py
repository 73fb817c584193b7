"""HRA."""

from __future__ import annotations

from typing import Any

from peft import HRAConfig
from peft.tuners.hra.layer import HRALayer

from adapterkit.methods import METHODS

CASES = {
    "hra": ("Layers", HRAConfig(r=2, target_modules=["q", "up", "point"])),
    "hra_orthogonal": ("Layers", HRAConfig(r=3, apply_GS=True, target_modules=["q"])),
}


def update_of(_path: str, module: Any, config: Any) -> Any:
    """The update of a wrapped module."""
    if not isinstance(module, HRALayer):
        return None
    return METHODS["hra"](u=module.hra_u["default"], gram_schmidt=config.apply_GS)
