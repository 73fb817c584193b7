"""FRoD."""

from __future__ import annotations

from typing import Any

from peft import FrodConfig
from peft.tuners.frod.layer import FrodLayer

from adapterkit.methods import METHODS

CASES = {"frod": ("Layers", FrodConfig(sparse_rate=0.2, progressbar=False, target_modules=["q", "up"]))}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module; modules of a kind hold the same basis and places."""
    if not isinstance(module, FrodLayer):
        return None
    own = {"l": module.frod_lambda_l["default"], "values": module.frod_lambda_s_values["default"]}
    return METHODS["frod"](**own, V=module.frod_V["default"], index=module.frod_s_indices["default"])
