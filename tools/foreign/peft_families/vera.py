"""VeRA."""

from __future__ import annotations

from typing import Any

from peft import VeraConfig
from peft.tuners.vera.layer import VeraLayer

from adapterkit.methods import METHODS

CASES = {"vera": ("Layers", VeraConfig(r=2, target_modules=["q", "up"]))}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module; all of them hold the same projections."""
    if not isinstance(module, VeraLayer):
        return None
    own = {"b": module.vera_lambda_b["default"], "d": module.vera_lambda_d["default"]}
    return METHODS["vera"](**own, A=module.vera_A["default"], B=module.vera_B["default"])
