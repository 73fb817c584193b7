"""PVeRA."""

from __future__ import annotations

from typing import Any

from peft import PveraConfig
from peft.tuners.pvera.layer import PveraLayer

from adapterkit.methods import METHODS

CASES = {"pvera": ("Layers", PveraConfig(r=2, target_modules=["q", "up"]))}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module; all of them hold the same projections."""
    if not isinstance(module, PveraLayer):
        return None
    own = {"b": module.pvera_lambda_b["default"], "d": module.pvera_lambda_d["default"]}
    return METHODS["pvera"](**own, A=module.pvera_A["default"], B=module.pvera_B["default"])
