"""SHiRA."""

from typing import Any

from peft import ShiraConfig
from peft.tuners.shira.layer import ShiraLayer

from adapterkit.methods.shira import SHiRA

CASES = {"shira": ("Layers", ShiraConfig(r=1, random_seed=2, target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> SHiRA | None:
    """Positions and values."""
    if not isinstance(layer, ShiraLayer):
        return None
    return SHiRA(index=layer.shira_indices["default"], values=layer.shira_weight["default"])
