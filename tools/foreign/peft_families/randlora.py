"""RandLoRA."""

from __future__ import annotations

from typing import Any

from peft import RandLoraConfig
from peft.tuners.randlora.layer import RandLoraLayer

from adapterkit.methods import METHODS

CASES = {"randlora": ("Layers", RandLoraConfig(r=2, randlora_alpha=7, target_modules=["q", "up"]))}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module; all of them hold the same bases."""
    if not isinstance(module, RandLoraLayer):
        return None
    own = {"lam": module.randlora_lambda["default"], "gamma": module.randlora_gamma["default"]}
    bases = {"A": module.randlora_A["default"], "B": module.randlora_B["default"]}
    return METHODS["randlora"](**own, **bases, scaling=module.scaling["default"])
